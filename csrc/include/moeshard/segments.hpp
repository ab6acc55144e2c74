// A file that need not exist: literal bytes, ranges of other files, zeros. A shard is one. It is written by
// write_files(), streamed into the engine by Model::load(), compared by first_difference() and summed by size().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "moeshard/gguf.hpp"

namespace moeshard {

// A table of expert ids, one row of `n_in` int32 per token, that becomes one of the ids of a shard: of each row the
// first `n_out`, each dropped id replaced by a kept one, each kept id by its number among the kept ones.
struct ExpertIdTable {
    uint32_t n_in = 0;
    uint32_t n_out = 0;
    std::vector<uint8_t> keep;  // (n_expert,)

    // `rows` rows of n_in ids -> `rows` rows of n_out ids. Throws Error on an id that is no expert.
    void convert(const int32_t* in, uint64_t rows, int32_t* out) const;
};

struct Segment {
    enum class Kind : uint8_t {
        kLiteral,    // `from` counts bytes in literals()
        kRange,      // bytes of a source, from byte `from` on
        kZeros,      // padding
        kExpertIds,  // table `table`, made from the source's bytes that begin at `from`
    };

    Kind kind = Kind::kZeros;
    uint64_t offset = 0;  // in the file that the segments make
    uint64_t size = 0;
    uint32_t source = 0;
    uint32_t table = 0;
    uint64_t from = 0;

    uint64_t end() const { return offset + size; }
};

class SegmentList {
public:
    // What segments read from; a range of the same file may be appended any number of times.
    uint32_t add_source(std::shared_ptr<const gguf::Mapping> mapping);

    void append(std::string_view literal);
    void append_range(uint32_t source, uint64_t from, uint64_t size);  // merged with an adjacent one before it
    void append_zeros(uint64_t size);
    void append_expert_ids(uint32_t source, uint64_t from, uint64_t rows, ExpertIdTable table);

    void end_header() { header_size_ = size(); }  // what follows is tensor data

    // The same file with other bytes from byte `offset` on. Throws Error where they would reach past its end or into a
    // table of expert ids.
    SegmentList with_bytes(uint64_t offset, std::string_view bytes) const;

    // Bytes before the data of tensors.
    uint64_t header_size() const { return header_size_; }
    uint64_t size() const { return segments_.empty() ? 0 : segments_.back().end(); }
    const std::vector<Segment>& segments() const { return segments_; }
    const std::vector<std::shared_ptr<const gguf::Mapping>>& sources() const { return sources_; }
    const std::string& literals() const { return literals_; }

    // Reads `size` bytes of the file, from byte `offset` on; all of them must lie inside. May be called by several
    // threads at once. Throws Error where a source can no longer be read.
    void read(uint64_t offset, uint8_t* out, uint64_t size) const;

    // Throws Error where a source is no longer what it was when it was opened.
    void check_sources() const;

private:
    void read_expert_ids(const Segment& segment, uint64_t at, uint8_t* out, uint64_t size) const;

    std::vector<Segment> segments_;
    std::vector<std::shared_ptr<const gguf::Mapping>> sources_;
    std::vector<ExpertIdTable> tables_;
    std::string literals_;
    uint64_t header_size_ = 0;
};

}  // namespace moeshard
