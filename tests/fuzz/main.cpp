// Runs the fuzz target where there is no libFuzzer: with any compiler that has AddressSanitizer.
//
//   fuzz_gguf [--seconds N] [--seed S] [--list] [--inputs FOLDER]    # --inputs writes what it begins with, for
//   libFuzzer fuzz_gguf FILE...                                       # runs the inputs in these files: crashes that
//   were found
//
// An input that takes more than 5 seconds, more memory than it should, or that fails in any other way than by an Error
// of the library ends the run, and is left in fuzz-crash-SEED-N. To go on for an hour: --seconds 3600 --seed 2.
//
// With clang: clang++ -std=c++17 -g -fsanitize=fuzzer,address,undefined -Icsrc/include tests/fuzz/{gguf_file,oracles,
// target,workspace}.cpp and the library built the same way.
#include <fcntl.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/time.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>

#include "gguf_file.hpp"
#include "moeshard/error.hpp"
#include "mutate.hpp"
#include "target.hpp"

// A header of some kilobytes has no business with more. UBSan ends the process by a signal, which is caught below.
extern "C" const char* __asan_default_options() {
    return "max_allocation_size_mb=256:hard_rss_limit_mb=1024:quarantine_size_mb=32:malloc_context_size=10";
}
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

constexpr int kMostSeconds = 5;

// What the handlers need: no allocation may be necessary to write the input down.
const std::string* current = nullptr;
char crash_name[64];

void say(const char* words) {
    if (::write(STDERR_FILENO, words, std::strlen(words)) < 0) return;
}

void keep_input() {
    fuzz::remove_files();
    if (current == nullptr) return;
    const int fd = ::open(crash_name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || ::write(fd, current->data(), current->size()) < 0) return;
    ::close(fd);
    current = nullptr;
    say("the input was written to ");
    say(crash_name);
    say("\n");
}

void on_signal(int number) {
    say(number == SIGPROF ? "this input takes too long\n" : "aborted\n");
    keep_input();
    ::_exit(number == SIGINT ? 130 : 1);
}

// Of processor time, so that a busy machine does not count.
void allow_seconds(int seconds) {
    const itimerval timer{{0, 0}, {seconds, 0}};
    ::setitimer(ITIMER_PROF, &timer, nullptr);
}

void run(const std::string& input) {
    current = &input;
    allow_seconds(kMostSeconds);
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    allow_seconds(0);
    current = nullptr;
}

struct Seed {
    fuzz::Input input;
    std::vector<fuzz::File> files;  // taken apart, where they are good
};

Seed to_seed(const fuzz::Input& input) {
    Seed seed{input, {}};
    try {
        if (input.cut > 0) seed.files.push_back(fuzz::take_apart(input.bytes.substr(0, input.cut)));
        seed.files.push_back(fuzz::take_apart(input.bytes.substr(input.cut)));
    } catch (const moeshard::Error&) {
        seed.files.clear();
    }
    return seed;
}

std::vector<Seed> first_seeds() {
    std::vector<Seed> seeds;
    for (const fuzz::File& model : fuzz::good_models()) {
        std::string bytes = model.bytes();
        bytes.resize(model.file_size(), '\0');
        // Several choices of experts each.
        for (uint32_t choice = 0; choice < 8; ++choice) seeds.push_back(to_seed({0, 0, choice, bytes}));
    }
    for (const std::string& bytes : fuzz::shard_inputs()) {
        seeds.push_back(to_seed(fuzz::Input::decode(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())));
    }
    return seeds;
}

Seed mutated(std::vector<Seed>& seeds, fuzz::Random& random) {
    Seed seed = random.of(seeds);
    Seed& other = random.of(seeds);
    if (random.one_in(2)) seed.input.choice = static_cast<uint32_t>(random.next());
    const bool by_pieces = !seed.files.empty() && !random.one_in(3);
    if (by_pieces) {
        const fuzz::File empty;
        const fuzz::File& from = other.files.empty() ? empty : other.files.front();
        for (uint64_t i = 0, n = 1 + random.below(4); i < n; ++i) {
            // Mostly the same in both of two, so that they still belong together.
            fuzz::Random same = random;
            for (fuzz::File& file : seed.files) {
                fuzz::Random once = same;
                if (!random.one_in(4)) fuzz::mutate(file, from, once);
            }
            random.next();
        }
        seed.input.bytes.clear();
        for (const fuzz::File& file : seed.files) {
            if (&file != &seed.files.front()) seed.input.cut = static_cast<uint32_t>(seed.input.bytes.size());
            seed.input.bytes += file.bytes();
        }
        seed.input.file_size = seed.files.size() == 1 ? seed.files.front().file_size() : 0;
    }
    for (uint64_t i = 0, n = by_pieces && !random.one_in(8) ? 0 : random.below(4); i < n; ++i) {
        seed.files.clear();
        fuzz::mutate(seed.input.bytes, other.input.bytes, random);
    }
    if (random.one_in(16)) seed.input.file_size = fuzz::notable(random, seed.input.bytes.size());
    if (random.one_in(32)) seed.input.cut = static_cast<uint32_t>(fuzz::notable(random, seed.input.cut));
    if (seed.input.bytes.size() > 1 << 17) seed.input.bytes.resize(1 << 17);
    return seed;
}

void report(uint64_t runs, double seconds, size_t seeds) {
    std::printf("%.0f s: %llu inputs, %.0f/s, %zu kept, %zu places reached\n", seconds,
                static_cast<unsigned long long>(runs), static_cast<double>(runs) / seconds, seeds,
                fuzz::reached().size());
    std::fflush(stdout);
}

void fuzz_for(double seconds, uint64_t seed, bool list) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
    std::vector<Seed> seeds = first_seeds();
    uint64_t runs = 0;
    for (const Seed& good : seeds) {
        run(good.input.encode());
        ++runs;
    }
    // Plain, grouped, with tables of ids, with biases.
    constexpr int kRoundTrips = 4;
    int round_trips = 0;
    for (const auto& reached : fuzz::reached()) round_trips += reached.first.rfind("round trip", 0) == 0 ? 1 : 0;
    if (round_trips < kRoundTrips) {
        std::printf("good models are not split and merged: this run would check nothing\n");
        std::exit(1);
    }
    fuzz::Random random(seed);
    double next_report = 0;
    while (elapsed() < seconds) {
        std::snprintf(crash_name, sizeof(crash_name), "fuzz-crash-%llu-%llu", static_cast<unsigned long long>(seed),
                      static_cast<unsigned long long>(runs));
        Seed tried = mutated(seeds, random);
        const size_t known = fuzz::reached().size();
        run(tried.input.encode());
        ++runs;
        if (fuzz::reached().size() > known) seeds.push_back(std::move(tried));
        if (elapsed() >= next_report) {
            report(runs, elapsed(), seeds.size());
            next_report = std::max(60.0, next_report * 2);
        }
    }
    for (const auto& [place, count] : fuzz::reached()) {
        if (list) std::printf("%12llu  %s\n", static_cast<unsigned long long>(count), place.c_str());
    }
    report(runs, elapsed(), seeds.size());
}

std::string read_file(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        std::fprintf(stderr, "%s: cannot open\n", path);
        std::exit(2);
    }
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_seeds(const std::string& folder) {
    size_t i = 0;
    for (const Seed& seed : first_seeds()) {
        std::ofstream file(folder + "/seed-" + std::to_string(i++), std::ios::binary);
        file << seed.input.encode();
    }
}

}  // namespace

int main(int argc, char** argv) {
    double seconds = 60;
    uint64_t seed = 1;
    __sanitizer_set_death_callback(keep_input);
    for (const int number : {SIGABRT, SIGPROF, SIGINT, SIGTERM}) std::signal(number, on_signal);
    bool list = false;
    bool replayed = false;
    for (int i = 1; i < argc; ++i) {
        const std::string option = argv[i];
        const bool has_value = i + 1 < argc;
        if (option == "--seconds" && has_value) {
            seconds = std::atof(argv[++i]);
        } else if (option == "--seed" && has_value) {
            seed = std::strtoull(argv[++i], nullptr, 10);
        } else if (option == "--list") {
            list = true;
        } else if (option == "--inputs" && has_value) {
            write_seeds(argv[++i]);
        } else if (option.rfind("--", 0) == 0) {
            std::fprintf(stderr, "usage: %s [--seconds N] [--seed S] [--list] [--inputs FOLDER] | FILE...\n", argv[0]);
            return 2;
        } else {
            run(read_file(argv[i]));
            replayed = true;
        }
    }
    if (!replayed) fuzz_for(seconds, seed, list);
    return 0;
}
