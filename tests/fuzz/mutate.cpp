#include "mutate.hpp"

#include <algorithm>
#include <cstring>

namespace fuzz {

namespace {

const std::vector<std::string> kArchs = {"qwen3moe", "deepseek2", "deepseek4", "grovemoe",
                                         "gpt-oss",  "lfm2moe",   "llama",     "x"};
const std::vector<std::string> kKeys = {
    "block_count",        "expert_count",       "expert_used_count", "expert_group_count",   "expert_group_used_count",
    "experts_per_group",  "expert_gating_func", "vocab_size",        "nextn_predict_layers", "embedding_length",
    "expert_weights_norm"};
const std::vector<std::string> kGlobalKeys = {"general.architecture", "general.alignment",   "split.no",
                                              "split.count",          "split.tensors.count", "moeshard.kind",
                                              "moeshard.layers",      "moeshard.kept",       "moeshard.experts",
                                              "moeshard.tensors",     "moeshard.source.x",   "moeshard.note",
                                              "tokenizer.ggml.tokens"};
const std::vector<std::string> kStems = {"ffn_gate_inp.weight",
                                         "ffn_gate_inp.bias",
                                         "ffn_gate_inp.scale",
                                         "ffn_gate_exps.weight",
                                         "ffn_up_exps.bias",
                                         "ffn_down_exps.scale",
                                         "ffn_up_exps.input_scale",
                                         "ffn_gate_up_exps.weight",
                                         "exp_probs_b.bias",
                                         "exp_probs_b",
                                         "ffn_gate_tid2eid.weight",
                                         "ffn_up_chexps.weight",
                                         "ffn_up.3.weight",
                                         "ffn_up_shexp.weight",
                                         "attn_q.weight",
                                         "something.weight",
                                         "ffn_norm_exps.weight",
                                         "ffn_other_exps.weight",
                                         "ffn_up_exps"};
const std::vector<std::string> kTexts = {"shard",       "trunk", "experts", "", "\xff\xfe", std::string("a\0b", 3),
                                         "of the model"};
const std::vector<uint32_t> kTensorTypes = {0, 1, 2, 8,  12, 14, 26, 27, 30,        39,
                                            3, 4, 5, 24, 36, 40, 41, 99, 0xffffffff};

std::string random_key(const File& file, Random& random) {
    std::vector<std::string> known = random.one_in(2) ? kGlobalKeys : kKeys;
    std::string key = random.of(known);
    if (known.size() == kGlobalKeys.size()) return key;
    std::vector<std::string> archs = kArchs;
    std::string arch = random.of(archs);
    for (const Field& field : file.fields) {
        if (field.key == "general.architecture" && field.value.size() > 8 && !random.one_in(8))
            arch = field.value.substr(8);
    }
    return arch + "." + key;
}

std::string random_name(Random& random) {
    std::vector<std::string> stems = kStems;
    return "blk." + std::to_string(random.below(random.one_in(8) ? 700 : 4)) + "." + random.of(stems);
}

void set_number(std::string& value, size_t at, size_t width, Random& random) {
    uint64_t old = 0;
    if (value.size() < at + width) return;
    std::memcpy(&old, value.data() + at, width);
    const uint64_t changed = notable(random, old);
    std::memcpy(value.data() + at, &changed, width);
}

size_t width_of(uint32_t type) {
    return type > 12 || type == 8 || type == 9 ? 8
                                               : moeshard::gguf::size_of(static_cast<moeshard::gguf::ValueType>(type));
}

void mutate_field(Field& field, const File& file, Random& random) {
    const size_t width = width_of(field.type);
    switch (random.below(8)) {
        case 0:
            field.key = random_key(file, random);
            break;
        case 1:
            field.type = static_cast<uint32_t>(random.below(14));
            if (random.one_in(2)) field.value.resize(width_of(field.type) * std::min<uint64_t>(field.count, 64), '\0');
            break;
        case 2:
            field.count = notable(random, field.count);
            field.is_array = true;
            break;
        case 3:  // an array that is longer or shorter, and says so
            field.is_array = true;
            field.count = random.below(9);
            field.value.resize(field.count * width, static_cast<char>(random.below(4)));
            break;
        case 4: {
            std::vector<std::string> texts = kTexts;
            field = {field.key, 8, false, 1, text(random.of(texts))};
            break;
        }
        case 5:
            field.is_array = !field.is_array;
            field.count = 1;
            break;
        default:
            set_number(field.value, random.below(std::max<size_t>(1, field.value.size() / width)) * width, width,
                       random);
    }
}

void mutate_tensor(TensorInfo& tensor, Random& random) {
    switch (random.below(6)) {
        case 0:
            tensor.name = random.one_in(16) ? std::string(random.below(70), 'n') : random_name(random);
            break;
        case 1: {
            std::vector<uint32_t> types = kTensorTypes;
            tensor.type = random.of(types);
            break;
        }
        case 2:
            tensor.n_dims = static_cast<uint32_t>(random.one_in(4) ? notable(random, tensor.n_dims) : random.below(6));
            if (random.one_in(2)) tensor.ne.resize(std::min(tensor.n_dims, 8U), 1);
            break;
        case 3:
            tensor.offset = notable(random, tensor.offset);
            break;
        case 4: {
            std::string& data = tensor.data;
            if (!data.empty()) data[random.below(data.size())] = static_cast<char>(random.next());
            break;
        }
        default:
            if (!tensor.ne.empty()) {
                uint64_t& n = random.of(tensor.ne);
                n = notable(random, n);
            }
    }
}

template <typename T>
void mutate_list(std::vector<T>& list, const std::vector<T>& other, Random& random) {
    const size_t at = random.below(list.size());
    switch (random.below(4)) {
        case 0:
            if (!list.empty()) list.erase(list.begin() + static_cast<std::ptrdiff_t>(at));
            break;
        case 1:
            if (!list.empty()) list.push_back(list[at]);
            break;
        case 2:
            if (!other.empty()) {
                list.insert(list.begin() + static_cast<std::ptrdiff_t>(at), other[random.below(other.size())]);
            }
            break;
        default:
            if (!list.empty()) std::swap(list[at], list.back());
    }
}

void mutate_head(File& file, Random& random) {
    switch (random.below(5)) {
        case 0:
            file.version = static_cast<uint32_t>(random.one_in(2) ? 2 : notable(random, file.version));
            break;
        case 1:
            file.n_fields = notable(random, file.fields.size());
            break;
        case 2:
            file.n_tensors = notable(random, file.tensors.size());
            break;
        case 3: {
            const uint64_t alignment = random.one_in(3) ? notable(random, 32) : uint64_t{1} << random.below(33);
            file.fields.push_back({"general.alignment", 4, false, 1, number(static_cast<uint32_t>(alignment))});
            if (alignment != 0) file.alignment = alignment;
            break;
        }
        default:
            file.magic[random.below(4)] ^= static_cast<char>(1 << random.below(8));
    }
}

}  // namespace

uint64_t notable(Random& random, uint64_t value) {
    switch (random.below(6)) {
        case 0:
            return random.below(20);
        case 1:
            return (uint64_t{1} << random.below(64)) - random.below(3) + 1;
        case 2:
            return uint64_t{0} - random.below(4);
        case 3:
            return random.one_in(2) ? value * (1 + random.below(4)) : value / (1 + random.below(4));
        default:
            return value + random.below(5) - 2;
    }
}

void mutate(File& file, const File& other, Random& random) {
    const uint64_t kind = random.below(16);
    if (kind < 6 && !file.fields.empty()) {
        mutate_field(random.of(file.fields), file, random);
    } else if (kind < 11 && !file.tensors.empty()) {
        mutate_tensor(random.of(file.tensors), random);
        if (!random.one_in(4)) file.place();
    } else if (kind < 12) {
        mutate_list(file.fields, other.fields, random);
    } else if (kind < 14) {
        mutate_list(file.tensors, other.tensors, random);
        file.place();
    } else if (kind < 15) {
        file.fields.push_back({random_key(file, random), 4, false, 1, number(static_cast<uint32_t>(random.below(10)))});
    } else {
        mutate_head(file, random);
        file.place();
    }
}

void mutate(std::string& bytes, const std::string& other, Random& random) {
    if (bytes.empty()) return;
    // Headers come first, and there is more to spoil in them than in data.
    const size_t end = random.one_in(3) ? bytes.size() : std::min<size_t>(bytes.size(), 1200);
    const size_t at = random.below(end);
    switch (random.below(8)) {
        case 0:
            bytes[at] ^= static_cast<char>(1 << random.below(8));
            break;
        case 1:
            bytes[at] = static_cast<char>(random.next());
            break;
        case 2:
            set_number(bytes, at, size_t{1} << random.below(4), random);
            break;
        case 3:
            bytes.resize(at);
            break;
        case 4:
            bytes.erase(at, 1 + random.below(16));
            break;
        case 5:
            bytes.insert(at, 1 + random.below(16), static_cast<char>(random.next()));
            break;
        case 6:
            bytes.insert(at, bytes.substr(random.below(end), random.below(64)));
            break;
        default:
            if (!other.empty()) bytes = bytes.substr(0, at) + other.substr(random.below(other.size()));
    }
}

}  // namespace fuzz
