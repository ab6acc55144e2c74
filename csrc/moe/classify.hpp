// The rules that tell trunk from what depends on experts.
#pragma once

#include <optional>
#include <string>

#include "moe/tensor_name.hpp"
#include "moeshard/moe_layout.hpp"

namespace moeshard {

class Classifier {
public:
    // The counts of `layout` must be set; it and `name`, which stands for the file, must outlive the classifier.
    // `is_shard`: what is not known was found to be trunk in the whole model; by the fewer experts of a shard, sizes
    // that are their multiples are a coincidence.
    Classifier(const MoeLayout& layout, uint64_t n_embd, bool is_shard, const std::string& name)
        : layout_(layout), n_embd_(n_embd), is_shard_(is_shard), name_(name) {}

    // Nothing for the trunk. The index of the tensor is left to the caller.
    std::optional<ExpertTensor> operator()(const gguf::Tensor& tensor) const;

private:
    ExpertTensor on_axis(const gguf::Tensor& tensor, const BlockName& name, Role role, int axis, uint64_t count) const;
    std::optional<ExpertTensor> named_expert(const gguf::Tensor& tensor, const BlockName& name) const;
    std::optional<ExpertTensor> router(const gguf::Tensor& tensor, const BlockName& name) const;
    ExpertTensor chunk(const gguf::Tensor& tensor, const BlockName& name) const;
    ExpertTensor ids(const gguf::Tensor& tensor, const BlockName& name) const;
    [[noreturn]] void fail(const gguf::Tensor& tensor, const std::string& why) const;

    const MoeLayout& layout_;
    const uint64_t n_embd_;
    const bool is_shard_;
    const std::string& name_;
};

}  // namespace moeshard
