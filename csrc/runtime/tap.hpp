// What layers compute on the way, read from the running graph: it is stopped where a tensor that somebody wants is
// done.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "moeshard/trace.hpp"

struct ggml_tensor;

namespace moeshard {

class Tap {
public:
    // From now on, read these layers (ascending), and compute nothing after the last. None: read nothing.
    void begin(const std::vector<int32_t>& layers);
    void end();

    // What the engine's scheduler calls: `ask` whether a tensor is wanted, then when it is done.
    static bool callback(ggml_tensor* tensor, bool ask, void* self);

    // Moves what was read into the layers of a micro-batch, and leaves only these. Throws Error where a tensor that was
    // expected did not come, or is not as expected.
    void hand_over(UbatchTrace& ubatch);

private:
    enum class What { kInput, kHidden, kResidual };
    struct Wanted {
        int32_t layer;
        What what;
    };

    const Wanted* wanted(const ggml_tensor& tensor) const;
    bool read(const ggml_tensor& tensor, const Wanted& wanted);

    std::unordered_map<std::string, Wanted> by_result_;  // name of a tensor
    std::unordered_map<std::string, Wanted> by_weight_;  // name of the weight that a tensor is multiplied by
    std::vector<int32_t> layers_;
    std::unordered_map<int32_t, LayerTrace> found_;
    std::string failed_;
};

}  // namespace moeshard
