// A program that knows only the installed package: it generates with the first half of every layer's experts.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "moeshard/context.hpp"
#include "moeshard/error.hpp"
#include "moeshard/generation.hpp"
#include "moeshard/model.hpp"

namespace {

moeshard::Keep first_experts(const moeshard::Routing& routing, int32_t count) {
    const auto n_layer = static_cast<size_t>(routing.n_layer);
    const auto n_expert = static_cast<size_t>(routing.n_expert);
    std::vector<uint8_t> keep(n_layer * n_expert, 0);
    for (size_t layer = 0; layer < n_layer; ++layer) {
        std::memset(keep.data() + layer * n_expert, 1, static_cast<size_t>(count));
    }
    return {routing.n_layer, routing.n_expert, keep.data()};
}

// Generates a few tokens and checks that none was routed to an expert that is not kept.
bool run(const char* path) {
    const auto model = moeshard::Model::load(path);
    moeshard::ContextParams params;
    params.n_ctx = 256;
    const auto context = std::make_shared<moeshard::Context>(model, params);
    const int32_t half = model->routing().n_expert / 2;
    const moeshard::Keep keep = first_experts(model->routing(), half);
    context->set_keep(&keep);

    const std::vector<int32_t> prompt = model->tokenize("The first half of the experts says that");
    moeshard::GenerationParams wanted;
    wanted.sampling.temperature = 0;
    wanted.max_tokens = 16;
    moeshard::Generation generation(context, prompt, wanted);
    while (const auto piece = generation.next()) std::fputs(piece->c_str(), stdout);
    std::printf("\n%zu tokens\n", generation.tokens().size());

    bool kept = true;
    size_t traced = 0;
    context->reset();
    context->trace({{0, prompt.data(), prompt.size()}}, {}, [&](moeshard::UbatchTrace& ubatch) {
        for (const moeshard::LayerTrace& layer : ubatch.layers) {
            for (const int32_t id : layer.ids) kept = kept && id < half;
            traced += layer.ids.size();
        }
    });
    std::printf("%zu routing decisions, %s\n", traced, kept ? "all kept" : "SOME DROPPED");
    return kept && traced > 0;
}

// Too few experts are an error that names the layer.
bool refuses_too_few(const char* path) {
    const auto model = moeshard::Model::load(path);
    moeshard::Context context(model, {});
    const moeshard::Keep keep = first_experts(model->routing(), 1);
    try {
        context.set_keep(&keep);
    } catch (const moeshard::Error& error) {
        std::printf("refused: %s\n", error.what());
        return std::strstr(error.what(), "layer") != nullptr;
    }
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    try {
        return run(argv[1]) && refuses_too_few(argv[1]) ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
