#include "moeshard/segments.hpp"

#include <algorithm>
#include <cstring>

#include "moeshard/keep.hpp"

namespace moeshard {

void ExpertIdTable::convert(const int32_t* in, uint64_t rows, int32_t* out) const {
    const auto n_expert = static_cast<int32_t>(keep.size());
    std::vector<int32_t> number(keep.size());
    int32_t n_kept = 0;
    for (size_t i = 0; i < keep.size(); ++i) number[i] = keep[i] ? n_kept++ : -1;
    std::vector<int32_t> ids(n_out);
    for (uint64_t row = 0; row < rows; ++row, in += n_in, out += n_out) {
        for (uint32_t i = 0; i < n_out; ++i) {
            if (in[i] < 0 || in[i] >= n_expert) {
                throw Error("a table of expert ids holds " + std::to_string(in[i]) + ", but the model has only " +
                            std::to_string(n_expert) + " experts; the file is damaged");
            }
        }
        replace_dropped(in, static_cast<int32_t>(n_out), keep.data(), n_expert, ids.data());
        for (uint32_t i = 0; i < n_out; ++i) out[i] = number[static_cast<size_t>(ids[i])];
    }
}

uint32_t SegmentList::add_source(std::shared_ptr<const gguf::Mapping> mapping) {
    const auto at = std::find(sources_.begin(), sources_.end(), mapping);
    if (at != sources_.end()) return static_cast<uint32_t>(at - sources_.begin());
    sources_.push_back(std::move(mapping));
    return static_cast<uint32_t>(sources_.size() - 1);
}

void SegmentList::append(std::string_view literal) {
    if (literal.empty()) return;
    const uint64_t from = literals_.size();
    literals_ += literal;
    if (!segments_.empty() && segments_.back().kind == Segment::Kind::kLiteral) {
        segments_.back().size += literal.size();  // literals follow each other in the file as in `literals_`
        return;
    }
    segments_.push_back({Segment::Kind::kLiteral, size(), literal.size(), 0, 0, from});
}

void SegmentList::append_range(uint32_t source, uint64_t from, uint64_t size) {
    if (size == 0) return;
    if (!segments_.empty()) {
        Segment& last = segments_.back();
        if (last.kind == Segment::Kind::kRange && last.source == source && last.from + last.size == from) {
            last.size += size;
            return;
        }
    }
    segments_.push_back({Segment::Kind::kRange, this->size(), size, source, 0, from});
}

void SegmentList::append_zeros(uint64_t size) {
    if (size == 0) return;
    segments_.push_back({Segment::Kind::kZeros, this->size(), size, 0, 0, 0});
}

void SegmentList::append_expert_ids(uint32_t source, uint64_t from, uint64_t rows, ExpertIdTable table) {
    const uint64_t size = rows * table.n_out * sizeof(int32_t);
    tables_.push_back(std::move(table));
    segments_.push_back(
        {Segment::Kind::kExpertIds, this->size(), size, source, static_cast<uint32_t>(tables_.size() - 1), from});
}

SegmentList SegmentList::with_bytes(uint64_t offset, std::string_view bytes) const {
    if (offset > size() || bytes.size() > size() - offset) {
        throw Error(std::to_string(bytes.size()) + " bytes at " + std::to_string(offset) +
                    " reach past the end of the shard, " + std::to_string(size()) + " bytes");
    }
    SegmentList out = *this;
    if (bytes.empty()) return out;
    out.literals_ += bytes;
    const uint64_t end = offset + bytes.size();
    std::vector<Segment> parts;  // what is left of the segments that the bytes lie in, with the bytes between them
    const auto first = std::partition_point(out.segments_.begin(), out.segments_.end(),
                                            [&](const Segment& segment) { return segment.end() <= offset; });
    auto last = first;
    if (first->offset < offset) {
        parts.push_back(*first);
        parts.back().size = offset - first->offset;
    }
    parts.push_back({Segment::Kind::kLiteral, offset, bytes.size(), 0, 0, literals_.size()});
    for (; last != out.segments_.end() && last->offset < end; ++last) {
        if (last->kind == Segment::Kind::kExpertIds) throw Error("a table of expert ids cannot be written over");
        if (last->end() <= end) continue;
        parts.push_back(*last);
        parts.back().offset = end;
        parts.back().size = last->end() - end;
        parts.back().from += end - last->offset;
    }
    out.segments_.insert(out.segments_.erase(first, last), parts.begin(), parts.end());
    return out;
}

void SegmentList::read(uint64_t offset, uint8_t* out, uint64_t size) const {
    if (offset > this->size() || size > this->size() - offset) {
        throw Error("a read of " + std::to_string(size) + " bytes at " + std::to_string(offset) +
                    " reaches past the end of the shard, " + std::to_string(this->size()) + " bytes");
    }
    auto segment = std::partition_point(segments_.begin(), segments_.end(),
                                        [&](const Segment& candidate) { return candidate.end() <= offset; });
    while (size > 0) {
        const uint64_t at = offset - segment->offset;
        const uint64_t n = std::min(size, segment->size - at);
        switch (segment->kind) {
            case Segment::Kind::kLiteral:
                std::memcpy(out, literals_.data() + segment->from + at, n);
                break;
            case Segment::Kind::kRange:
                sources_[segment->source]->read(segment->from + at, out, n);
                break;
            case Segment::Kind::kZeros:
                std::memset(out, 0, n);
                break;
            case Segment::Kind::kExpertIds:
                read_expert_ids(*segment, at, out, n);
                break;
        }
        offset += n;
        out += n;
        size -= n;
        ++segment;
    }
}

// In blocks of rows, since a reader may ask for bytes that begin and end inside of them.
void SegmentList::read_expert_ids(const Segment& segment, uint64_t at, uint8_t* out, uint64_t size) const {
    constexpr uint64_t kBlockRows = 16384;
    const ExpertIdTable& table = tables_[segment.table];
    const uint64_t row_in = table.n_in * sizeof(int32_t);
    const uint64_t row_out = table.n_out * sizeof(int32_t);
    std::vector<int32_t> in;
    std::vector<int32_t> converted;
    while (size > 0) {
        const uint64_t first = at / row_out;
        const uint64_t skip = at % row_out;
        const uint64_t rows = std::min(kBlockRows, (skip + size + row_out - 1) / row_out);
        in.resize(rows * table.n_in);
        converted.resize(rows * table.n_out);
        sources_[segment.source]->read(segment.from + first * row_in, reinterpret_cast<uint8_t*>(in.data()),
                                       rows * row_in);
        table.convert(in.data(), rows, converted.data());
        const uint64_t n = std::min(size, rows * row_out - skip);
        std::memcpy(out, reinterpret_cast<const uint8_t*>(converted.data()) + skip, n);
        at += n;
        out += n;
        size -= n;
    }
}

void SegmentList::check_sources() const {
    for (const auto& source : sources_) source->check_unchanged();
}

}  // namespace moeshard
