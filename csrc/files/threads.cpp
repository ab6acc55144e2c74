#include "files/threads.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <fstream>
#include <mutex>
#include <set>
#include <sstream>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "moeshard/error.hpp"

namespace moeshard::files {

namespace {

#if defined(__linux__)

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

std::vector<int> allowed_processors() {
    std::vector<int> found;
    // A machine may have more processors than the fixed set has room for.
    for (int room = 1024; room <= 1 << 20; room *= 4) {
        cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(room));
        const size_t size = CPU_ALLOC_SIZE(static_cast<size_t>(room));
        const bool known = sched_getaffinity(0, size, set) == 0;
        for (int i = 0; known && i < room; ++i) {
            if (CPU_ISSET_S(static_cast<size_t>(i), size, set)) found.push_back(i);
        }
        CPU_FREE(set);
        if (known) break;
    }
    return found;
}

// Processors that share a core name the same siblings.
int physical_cores(const std::string& root, const std::vector<int>& processors) {
    std::set<std::string> cores;
    for (const int processor : processors) {
        const std::string topology = root + "/sys/devices/system/cpu/cpu" + std::to_string(processor) + "/topology/";
        std::string siblings = first_line(topology + "core_cpus_list");
        if (siblings.empty()) siblings = first_line(topology + "thread_siblings_list");
        cores.insert(siblings.empty() ? "alone " + std::to_string(processor) : siblings);
    }
    return static_cast<int>(cores.size());
}

bool has_word(const std::string& list, const std::string& word) {
    std::istringstream words(list);
    for (std::string each; std::getline(words, each, ',');) {
        if (each == word) return true;
    }
    return false;
}

// A mounted hierarchy of control groups that limits processors, and where this process is in it.
struct Hierarchy {
    std::string mount;
    std::string path;  // below the mount; empty: the mount itself
    bool v2 = false;
};

std::vector<Hierarchy> hierarchies(const std::string& root) {
    std::string own_v1;
    std::string own_v2;
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // number:controllers:path
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (controllers.empty()) own_v2 = line.substr(second + 1);
        if (has_word(controllers, "cpu")) own_v1 = line.substr(second + 1);
    }
    std::vector<Hierarchy> found;
    std::ifstream mounts(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(mounts, line);) {
        // id parent major:minor root mount options… - type source options
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        std::istringstream before(line.substr(0, dash));
        std::istringstream after(line.substr(dash + 3));
        std::string id, parent, device, top, mount, type, source, options;
        before >> id >> parent >> device >> top >> mount;
        after >> type >> source >> options;
        const bool v2 = type == "cgroup2";
        if (!v2 && !(type == "cgroup" && has_word(options, "cpu"))) continue;
        std::string path = v2 ? own_v2 : own_v1;
        // In a container the mount may show a part of the hierarchy only.
        if (top != "/" && path.compare(0, top.size(), top) == 0) path.erase(0, top.size());
        if (path == "/" || path.compare(0, 3, "/..") == 0) path.clear();
        found.push_back({root + mount, path, v2});
    }
    return found;
}

// Processors that one group may use, or `most` where it says nothing.
double quota_of(const std::string& group, bool v2, double most) {
    double quota = -1.0;
    double period = 0.0;
    if (v2) {
        std::istringstream line(first_line(group + "/cpu.max"));
        std::string word;
        if (!(line >> word >> period) || word == "max") return most;
        std::istringstream(word) >> quota;
    } else {
        std::istringstream(first_line(group + "/cpu.cfs_quota_us")) >> quota;
        std::istringstream(first_line(group + "/cpu.cfs_period_us")) >> period;
    }
    return quota > 0.0 && period > 0.0 ? std::min(most, quota / period) : most;
}

double quota(const std::string& root, double most) {
    for (const Hierarchy& hierarchy : hierarchies(root)) {
        std::string path = hierarchy.path;
        for (;;) {
            most = quota_of(hierarchy.mount + path, hierarchy.v2, most);
            if (path.empty()) break;
            path.erase(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
        }
    }
    return most;
}

#endif

}  // namespace

int usable_processors(const std::string& root) {
    int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    const std::vector<int> allowed = allowed_processors();
    if (!allowed.empty()) count = physical_cores(root, allowed);
    count = static_cast<int>(quota(root, static_cast<double>(count)));
#elif defined(__APPLE__)
    int cores = 0;
    size_t size = sizeof(cores);
    // Efficiency cores hold the others up: a graph is as fast as its slowest thread.
    for (const char* name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {
        if (sysctlbyname(name, &cores, &size, nullptr, 0) == 0 && cores > 0) {
            count = cores;
            break;
        }
    }
#endif
    return std::min(std::max(count, 1), kMostThreads);
}

int threads_wanted(int wanted, const std::string& what) {
    if (wanted < 0 || wanted > kMostThreads) {
        throw Error(what + " must be from 1 to " + std::to_string(kMostThreads) + ", or 0 for as many as are of use (" +
                    std::to_string(usable_processors()) + " here), got " + std::to_string(wanted));
    }
    return wanted == 0 ? usable_processors() : wanted;
}

int startable_threads(int wanted) {
    std::mutex mutex;
    std::condition_variable changed;
    bool end = false;
    std::vector<std::thread> threads;
    try {
        for (int i = 0; i < wanted; ++i) {
            threads.emplace_back([&] {
                std::unique_lock<std::mutex> lock(mutex);
                changed.wait(lock, [&] { return end; });
            });
        }
    } catch (const std::system_error&) {
        // so many and no more
    }
    {
        const std::lock_guard<std::mutex> lock(mutex);
        end = true;
    }
    changed.notify_all();
    for (std::thread& thread : threads) thread.join();
    return static_cast<int>(threads.size());
}

}  // namespace moeshard::files
