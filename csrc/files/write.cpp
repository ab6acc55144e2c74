#include "moeshard/write.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <filesystem>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <thread>

#include "files/copy.hpp"
#include "files/pending_file.hpp"
#include "files/place.hpp"
#include "files/threads.hpp"

namespace moeshard {

namespace {

using files::PendingFile;
using files::Place;

constexpr uint64_t kTaskBytes = 8 << 20;    // progress is seen, and work shared, in steps of this
constexpr uint64_t kAheadBytes = 16 << 20;  // read before they are copied
constexpr uint64_t kTableBytes = 4 << 20;   // converted at once
constexpr int kMostJobs = 4;                // more only wait for the disk

// A part of a segment.
struct Task {
    size_t output;
    const Segment* segment;
    uint64_t at;  // in the segment
    uint64_t size;
};

// In the order of the sources, so that what several outputs take from one place is read once.
std::vector<Task> tasks_of(const std::vector<Output>& outputs) {
    std::vector<Task> tasks;
    for (size_t i = 0; i < outputs.size(); ++i) {
        for (const Segment& segment : outputs[i].segments->segments()) {
            if (segment.kind == Segment::Kind::kZeros) continue;  // a new file is zeros
            const bool is_table = segment.kind == Segment::Kind::kExpertIds;
            const uint64_t step = is_table ? kTableBytes : kTaskBytes;
            for (uint64_t at = 0; at < segment.size; at += step) {
                tasks.push_back({i, &segment, at, std::min(step, segment.size - at)});
            }
        }
    }
    const auto place = [&](const Task& task) {
        const auto& sources = outputs[task.output].segments->sources();
        const bool is_literal = task.segment->kind == Segment::Kind::kLiteral;
        const std::string_view path = is_literal ? std::string_view() : sources[task.segment->source]->path();
        return std::make_tuple(path, task.segment->from + task.at, task.output);
    };
    std::sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return place(a) < place(b); });
    return tasks;
}

void run(const Task& task, const SegmentList& list, const PendingFile& file, files::Copier& copier) {
    const uint64_t offset = task.segment->offset + task.at;
    switch (task.segment->kind) {
        case Segment::Kind::kLiteral: {
            const char* data = list.literals().data() + task.segment->from + task.at;
            files::write_at(file.fd(), file.path(), offset, reinterpret_cast<const uint8_t*>(data), task.size);
            break;
        }
        case Segment::Kind::kRange:
            copier.copy_range(*list.sources()[task.segment->source], task.segment->from + task.at, file.fd(),
                              file.path(), offset, task.size);
            break;
        case Segment::Kind::kExpertIds: {
            std::vector<uint8_t> bytes(task.size);
            list.read(offset, bytes.data(), bytes.size());
            files::write_at(file.fd(), file.path(), offset, bytes.data(), bytes.size());
            break;
        }
        case Segment::Kind::kZeros:
            break;
    }
}

// Whatever does not share blocks with its source. A sparse one may need no space at all.
void reserve(const SegmentList& list, const PendingFile& file) {
    for (const auto& source : list.sources()) {
        if (source->is_sparse()) return;
    }
    uint64_t begin = 0;
    const auto reserve_up_to = [&](uint64_t end) {
        if (end > begin) files::reserve(file.fd(), file.path(), begin, end - begin);
    };
    for (const Segment& segment : list.segments()) {
        const bool is_range = segment.kind == Segment::Kind::kRange;
        if (!is_range || !files::may_share(segment.from, segment.offset, segment.size)) continue;
        reserve_up_to(segment.offset);
        begin = segment.end();
    }
    reserve_up_to(list.size());
}

std::vector<Place> find_places(const std::vector<std::string>& paths, const std::vector<files::Input>& inputs,
                               bool force) {
    std::vector<Place> places;
    std::set<std::string> targets;
    for (const std::string& path : paths) {
        places.push_back(files::find_place(path, inputs, force));
        if (!targets.insert(places.back().target).second) throw Error(path + ": would be written twice");
    }
    return places;
}

std::vector<Place> find_places(const std::vector<Output>& outputs, const WriteParams& params) {
    std::vector<std::string> paths;
    std::vector<files::Input> inputs;
    for (const std::string& path : params.inputs) inputs.push_back({path});
    for (const Output& output : outputs) {
        paths.push_back(output.path);
        for (const auto& source : output.segments->sources()) inputs.push_back({source->path(), source->fd()});
    }
    return find_places(paths, inputs, params.force);
}

// Runs tasks in threads while the calling one shows how far they are.
class Crew {
public:
    Crew(const std::vector<Output>& outputs, const std::vector<std::unique_ptr<PendingFile>>& files)
        : outputs_(outputs), files_(files), tasks_(tasks_of(outputs)) {
        for (const Task& task : tasks_) total_ += task.size;
    }

    void run(int jobs, const ByteProgress& progress) {
        std::vector<std::thread> threads;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            try {
                for (int i = 0; i < jobs; ++i) {
                    threads.emplace_back([this] { work(); });
                    ++running_;
                }
            } catch (const std::system_error&) {
                // Fewer do it too; where there is none, this one does it.
                if (threads.empty()) {
                    ++running_;
                    lock.unlock();
                    work();
                    lock.lock();
                }
            }
            while (running_ > 0) {
                changed_.wait_for(lock, std::chrono::milliseconds(50));
                lock.unlock();
                try {
                    if (progress && !stop_ && !progress(done_, total_)) throw Error("writing was cancelled");
                } catch (...) {
                    stop_with(std::current_exception());
                }
                lock.lock();
            }
        }
        for (std::thread& thread : threads) thread.join();
        if (error_) std::rethrow_exception(error_);
    }

private:
    void work() {
        try {
            files::Copier copier;
            while (const Task* task = take()) {
                moeshard::run(*task, *outputs_[task->output].segments, *files_[task->output], copier);
                done_ += task->size;
            }
        } catch (...) {
            stop_with(std::current_exception());
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        --running_;
        changed_.notify_one();
    }

    // nullptr when nothing is left to do.
    const Task* take() {
        const std::lock_guard<std::mutex> lock(take_mutex_);
        if (stop_ || next_ == tasks_.size()) return nullptr;
        const Task& task = tasks_[next_++];
        taken_ += task.size;
        for (; ahead_ < tasks_.size() && ahead_bytes_ < taken_ + kAheadBytes; ++ahead_) {
            const Task& later = tasks_[ahead_];
            ahead_bytes_ += later.size;
            if (later.segment->kind != Segment::Kind::kRange) continue;
            const gguf::Mapping& source = *outputs_[later.output].segments->sources()[later.segment->source];
            files::read_ahead(source, later.segment->from + later.at, later.size);
        }
        return &task;
    }

    void stop_with(std::exception_ptr error) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::move(error);
        stop_ = true;
    }

    const std::vector<Output>& outputs_;
    const std::vector<std::unique_ptr<PendingFile>>& files_;
    std::vector<Task> tasks_;
    uint64_t total_ = 0;
    std::mutex take_mutex_;  // for the four that follow
    size_t next_ = 0;
    size_t ahead_ = 0;  // tasks whose bytes are being read
    uint64_t taken_ = 0;
    uint64_t ahead_bytes_ = 0;
    std::atomic<uint64_t> done_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable changed_;
    int running_ = 0;
    std::exception_ptr error_;
};

// All files get their names, or none does. Where existing files may be replaced what they were is lost, so then those
// that have their names keep them.
void publish(const std::vector<std::unique_ptr<PendingFile>>& files, bool force) {
    size_t n_published = 0;
    try {
        for (; n_published < files.size(); ++n_published) files[n_published]->publish(force);
    } catch (...) {
        for (size_t i = 0; i < n_published && !force; ++i) ::unlink(files[i]->target().c_str());
        throw;
    }
}

}  // namespace

void check_outputs(const std::vector<std::string>& paths, const std::vector<std::string>& inputs, bool force) {
    std::vector<files::Input> read;
    for (const std::string& path : inputs) read.push_back({path});
    find_places(paths, read, force);
}

void write_files(const std::vector<Output>& outputs, const WriteParams& params) {
    std::vector<Place> places = find_places(outputs, params);
    for (const Output& output : outputs) output.segments->check_sources();
    std::vector<std::unique_ptr<PendingFile>> files;
    for (size_t i = 0; i < outputs.size(); ++i) {
        files.push_back(std::make_unique<PendingFile>(std::move(places[i]), outputs[i].segments->size()));
        reserve(*outputs[i].segments, *files.back());
    }
    const int jobs = files::threads_wanted(params.jobs, "jobs");
    Crew(outputs, files).run(params.jobs > 0 ? jobs : std::min(jobs, kMostJobs), params.progress);
    for (const auto& file : files) file->flush();
    for (const Output& output : outputs) output.segments->check_sources();
    std::set<std::string> folders;
    publish(files, params.force);
    for (const auto& file : files) folders.insert(files::folder_of(file->target()));
    for (const std::string& folder : folders) files::flush_folder(folder);
}

}  // namespace moeshard
