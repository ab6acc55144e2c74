#include "gguf_file.hpp"

#include <algorithm>
#include <cstring>

namespace fuzz {

namespace {

constexpr uint64_t kMostData = 1 << 16;  // more of a file is left to be a hole

struct Block {
    uint32_t type;
    uint64_t elements;
    uint64_t bytes;
};

// The ggml types that are made here.
constexpr Block kBlocks[] = {{0, 1, 4},      {1, 1, 2},  {2, 32, 18}, {8, 32, 34}, {12, 256, 144},
                             {14, 256, 210}, {26, 1, 4}, {27, 1, 8},  {30, 1, 2},  {39, 32, 17}};

uint64_t align(uint64_t value, uint64_t alignment) {
    return alignment == 0 ? value : (value + alignment - 1) / alignment * alignment;
}

std::string header(const File& file) {
    std::string out = file.magic + number(file.version) + number(file.n_tensors.value_or(file.tensors.size())) +
                      number(file.n_fields.value_or(file.fields.size()));
    for (const Field& field : file.fields) {
        out += text(field.key);
        if (field.is_array) out += number<uint32_t>(9);
        out += number(field.type);
        if (field.is_array) out += number(field.count);
        out += field.value;
    }
    for (const TensorInfo& tensor : file.tensors) {
        out += text(tensor.name) + number(tensor.n_dims);
        for (const uint64_t n : tensor.ne) out += number(n);
        out += number(tensor.type) + number(tensor.offset);
    }
    return out;
}

}  // namespace

std::string text(std::string_view value) { return number<uint64_t>(value.size()) + std::string(value); }

uint64_t size_of(const TensorInfo& tensor) {
    const auto* block =
        std::find_if(std::begin(kBlocks), std::end(kBlocks), [&](const Block& b) { return b.type == tensor.type; });
    if (block == std::end(kBlocks)) return 0;
    __extension__ unsigned __int128 bytes = block->bytes;
    for (size_t i = 0; i < tensor.ne.size(); ++i) {
        bytes *= i == 0 ? tensor.ne[i] / block->elements : tensor.ne[i];
        if (bytes > uint64_t{1} << 48) return 0;
    }
    return static_cast<uint64_t>(bytes);
}

void File::place() {
    uint64_t at = 0;
    for (TensorInfo& tensor : tensors) {
        tensor.offset = at;
        at += align(size_of(tensor), alignment);
    }
}

std::string File::bytes() const {
    std::string out = header(*this);
    out.resize(align(out.size(), std::min(alignment, kMostData)), '\0');
    const size_t data = out.size();
    for (const TensorInfo& tensor : tensors) {
        if (tensor.offset > kMostData || tensor.data.size() > kMostData) continue;
        out.resize(std::max(out.size(), data + tensor.offset + tensor.data.size()), '\0');
        std::copy(tensor.data.begin(), tensor.data.end(),
                  out.begin() + static_cast<std::ptrdiff_t>(data + tensor.offset));
    }
    return out;
}

uint64_t File::file_size() const {
    const uint64_t data = align(header(*this).size(), alignment);
    uint64_t end = data;
    for (const TensorInfo& tensor : tensors)
        end = std::max(end, data + tensor.offset + align(size_of(tensor), alignment));
    return end;
}

std::string Input::encode() const { return number(file_size) + number(cut) + number(choice) + bytes; }

Input Input::decode(const uint8_t* data, size_t size) {
    Input input;
    if (size < kHead) return input;
    std::memcpy(&input.file_size, data, 8);
    std::memcpy(&input.cut, data + 8, 4);
    std::memcpy(&input.choice, data + 12, 4);
    input.bytes.assign(reinterpret_cast<const char*>(data) + kHead, size - kHead);
    return input;
}

File take_apart(const std::string& bytes) {
    const auto* begin = reinterpret_cast<const uint8_t*>(bytes.data());
    const auto directory = moeshard::gguf::parse({begin, bytes.size()}, "input");
    File file;
    file.version = directory.version;
    file.alignment = directory.alignment;
    for (const auto& entry : directory.entries) {
        const std::string value(reinterpret_cast<const char*>(entry.value.data), entry.value.size);
        file.fields.push_back({entry.key, static_cast<uint32_t>(entry.type), entry.is_array, entry.count, value});
    }
    for (const auto& tensor : directory.tensors) {
        file.tensors.push_back({tensor.name,
                                tensor.n_dims,
                                {tensor.ne.begin(), tensor.ne.begin() + tensor.n_dims},
                                tensor.type,
                                tensor.offset - directory.data_offset,
                                bytes.substr(tensor.offset, tensor.nbytes)});
    }
    return file;
}

namespace {

constexpr uint32_t kU8 = 0, kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8;
constexpr uint32_t kTensorF32 = 0, kTensorF16 = 1, kTensorQ4 = 2, kTensorQ8 = 8, kTensorQ4K = 12, kTensorI32 = 26,
                   kTensorBf16 = 30, kTensorMxfp4 = 39;

class Builder {
public:
    Builder(std::string arch, uint32_t n_layer, uint32_t n_expert, uint32_t n_used) : arch_(std::move(arch)) {
        field("general.architecture", kString, text(arch_));
        field("general.name", kString, text("a model"));
        own("block_count", n_layer);
        own("embedding_length", 32);
        if (n_expert != 0) own("expert_count", n_expert);
        if (n_used != 0) own("expert_used_count", n_used);
    }

    Builder& field(const std::string& key, uint32_t type, const std::string& value) {
        file_.fields.push_back({key, type, false, 1, value});
        return *this;
    }

    Builder& array(const std::string& key, uint32_t type, uint64_t count, const std::string& value) {
        file_.fields.push_back({key, type, true, count, value});
        return *this;
    }

    Builder& own(const std::string& key, uint32_t value) { return field(arch_ + "." + key, kU32, number(value)); }

    // Data that differs from place to place, so that a wrong slab is seen.
    Builder& tensor(const std::string& name, std::vector<uint64_t> ne, uint32_t type) {
        TensorInfo info{name, static_cast<uint32_t>(ne.size()), ne, type, 0, {}};
        while (info.data.size() < size_of(info))
            info.data += static_cast<char>((state_ = state_ * 1103515245 + 12345) >> 16);
        file_.tensors.push_back(std::move(info));
        return *this;
    }

    // Of layer `layer`; slabs of `type`.
    Builder& experts(uint32_t layer, uint64_t n_expert, uint32_t type) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        const uint64_t row = type == kTensorQ4K ? 256 : 32;
        tensor(block + "ffn_gate_inp.weight", {32, n_expert}, kTensorF32);
        tensor(block + "ffn_gate_exps.weight", {row, 2, n_expert}, type);
        tensor(block + "ffn_up_exps.weight", {row, 2, n_expert}, type);
        return tensor(block + "ffn_down_exps.weight", {row, 3, n_expert}, type);
    }

    // Ids of `n_used` of `n_expert` experts for each of `n_vocab` tokens.
    Builder& ids(uint32_t layer, uint32_t n_used, uint32_t n_expert, uint32_t n_vocab) {
        tensor("blk." + std::to_string(layer) + ".ffn_gate_tid2eid.weight", {n_used, n_vocab}, kTensorI32);
        std::string& data = file_.tensors.back().data;
        data.clear();
        for (uint32_t token = 0; token < n_vocab; ++token) {
            for (uint32_t i = 0; i < n_used; ++i)
                data += number<int32_t>(static_cast<int32_t>((token * 3 + i) % n_expert));
        }
        return *this;
    }

    File build() {
        file_.place();
        return file_;
    }

private:
    std::string arch_;
    File file_;
    uint32_t state_ = 1;
};

}  // namespace

std::vector<File> good_models() {
    std::vector<File> models;
    Builder qwen("qwen3moe", 2, 8, 2);
    qwen.array("tokenizer.ggml.tokens", kString, 3, text("a") + text("b\xff") + text(""));
    qwen.tensor("token_embd.weight", {32, 3}, kTensorF16).experts(0, 8, kTensorQ8).experts(1, 8, kTensorQ4);
    models.push_back(qwen.tensor("blk.1.attn_q.weight", {32, 8}, kTensorBf16).build());

    // Groups, a dense layer, shared experts, a selection bias.
    Builder deepseek("deepseek2", 3, 16, 4);
    deepseek.own("expert_group_count", 4).own("expert_group_used_count", 2).own("expert_gating_func", 2);
    deepseek.own("leading_dense_block_count", 1).field("deepseek2.expert_weights_norm", kBool, number<uint8_t>(1));
    deepseek.tensor("blk.0.ffn_up.weight", {32, 16}, kTensorQ8).experts(1, 16, kTensorQ4).experts(2, 16, kTensorQ4);
    deepseek.tensor("blk.1.exp_probs_b.bias", {16}, kTensorF32).tensor("blk.2.exp_probs_b.bias", {16}, kTensorF32);
    models.push_back(deepseek.tensor("blk.1.ffn_up_shexp.weight", {32, 16}, kTensorQ8).build());

    // Experts looked up by token.
    Builder hash("deepseek4", 2, 6, 2);
    hash.own("expert_gating_func", 4).own("nextn_predict_layers", 1).own("vocab_size", 9);
    models.push_back(hash.ids(0, 2, 6, 9).experts(0, 6, kTensorQ8).experts(1, 6, kTensorMxfp4).build());

    // Slabs shared by neighbours.
    Builder grove("grovemoe", 1, 8, 2);
    grove.own("experts_per_group", 2).experts(0, 8, kTensorQ8);
    grove.tensor("blk.0.ffn_gate_chexps.weight", {32, 2, 4}, kTensorQ8);
    models.push_back(grove.tensor("blk.0.ffn_down_chexps.weight", {32, 1, 4}, kTensorF32).build());

    // Biases and scales of experts, a router with a bias, one matrix for gate and up, another alignment.
    Builder oss("gpt-oss", 1, 4, 2);
    oss.field("general.alignment", kU32, number<uint32_t>(64)).tensor("blk.0.ffn_gate_inp.weight", {32, 4}, kTensorF32);
    oss.tensor("blk.0.ffn_gate_inp.bias", {4}, kTensorF32);
    oss.tensor("blk.0.ffn_gate_up_exps.weight", {32, 4, 4}, kTensorMxfp4);
    oss.tensor("blk.0.ffn_gate_up_exps.bias", {4, 4}, kTensorF32);
    oss.tensor("blk.0.ffn_down_exps.weight", {32, 2, 4}, kTensorMxfp4);
    File aligned = oss.tensor("blk.0.ffn_down_exps.scale", {4}, kTensorF32).build();
    aligned.alignment = 64;
    aligned.place();
    models.push_back(std::move(aligned));

    // A number of used experts for each layer, counts in small types, super-blocks.
    Builder hybrid("lfm2moe", 3, 0, 0);
    hybrid.field("lfm2moe.expert_count", kU8, number<uint8_t>(3)).own("expert_gating_func", 1);
    hybrid.array("lfm2moe.expert_used_count", kI32, 3, number<int32_t>(0) + number<int32_t>(2) + number<int32_t>(1));
    hybrid.array("lfm2moe.scales", kF32, 2, number(0.5F) + number(2.0F)).tensor("blk.0.ssm_in.weight", {5}, kTensorF32);
    models.push_back(hybrid.experts(1, 3, kTensorQ4K).experts(2, 3, kTensorF16).build());

    Builder dense("llama", 1, 0, 0);
    models.push_back(
        dense.tensor("blk.0.ffn_up.weight", {32, 2}, kTensorQ8).tensor("output_norm.weight", {8}, kTensorF32).build());
    return models;
}

}  // namespace fuzz
