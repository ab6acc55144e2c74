// What the tokens of a sequence missed in the last decode; see Context::missed.
#pragma once

#include <cmath>
#include <vector>

namespace moeshard {

struct Missed {
    std::vector<float> mean;      // (n_tokens,)
    std::vector<float> by_layer;  // (n_tokens, n_layers)

    void clear() {
        mean.clear();
        by_layer.clear();
    }

    // A token's shares; NaN where a layer did not compute it.
    void add(const std::vector<float>& layers) {
        float sum = 0.0f;
        int n = 0;
        for (const float share : layers) {
            if (std::isnan(share)) continue;
            sum += share;
            ++n;
        }
        mean.push_back(n == 0 ? 0.0f : sum / static_cast<float>(n));
        by_layer.insert(by_layer.end(), layers.begin(), layers.end());
    }
};

}  // namespace moeshard
