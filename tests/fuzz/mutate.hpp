// Changes to inputs: of single pieces of a file whose rest stays good, and of bytes whatever they mean.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf_file.hpp"

namespace fuzz {

// The same numbers on every platform.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t next() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t n) { return n == 0 ? 0 : next() % n; }
    bool one_in(uint64_t n) { return below(n) == 0; }
    template <typename T>
    T& of(std::vector<T>& list) {
        return list[below(list.size())];
    }

private:
    uint64_t state_;
};

// An integer near the limits of something, or near `value`.
uint64_t notable(Random& random, uint64_t value);

// Spoils one piece of `file`; `other` is a good file to take pieces from.
void mutate(File& file, const File& other, Random& random);

// Spoils bytes; `other` are those of an input to splice with.
void mutate(std::string& bytes, const std::string& other, Random& random);

}  // namespace fuzz
