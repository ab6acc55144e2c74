// What a keep is good for: a mask on a loaded model, and half of a model, read without a file of it.
//
//     half MODEL.gguf [PROMPT]
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "moeshard/context.hpp"
#include "moeshard/generation.hpp"
#include "moeshard/gguf.hpp"
#include "moeshard/model.hpp"
#include "moeshard/shard.hpp"

namespace {

// The experts of even number, in every layer.
moeshard::Keep every_second(const moeshard::Routing& routing) {
    const size_t n_expert = static_cast<size_t>(routing.n_expert);
    std::vector<uint8_t> keep(static_cast<size_t>(routing.n_layer) * n_expert);
    for (size_t i = 0; i < keep.size(); ++i) keep[i] = i % n_expert % 2 == 0;
    return {routing.n_layer, routing.n_expert, keep.data()};
}

std::string answer(const std::shared_ptr<const moeshard::Model>& model, const std::string& prompt,
                   const moeshard::Keep* keep) {
    const auto context = std::make_shared<moeshard::Context>(model, moeshard::ContextParams{});
    context->set_keep(keep);
    moeshard::GenerationParams params;
    params.sampling.temperature = 0;
    params.max_tokens = 24;
    moeshard::Generation generation(context, model->tokenize(prompt), params);
    std::string text;
    while (const auto piece = generation.next()) text += *piece;
    return text;
}

void run(const std::string& path, const std::string& prompt) {
    // A mask: the whole model is loaded, and may use these experts only.
    const auto whole = moeshard::Model::load(path);
    const moeshard::Keep keep = every_second(whole->routing());
    const std::string masked = answer(whole, prompt, &keep);
    std::printf("mask:  %s\n", masked.c_str());

    // A shard: only these experts' bytes are read. moeshard::write_files would make a file of the same segments.
    const moeshard::gguf::GGUFMap source(path);
    const auto segments = moeshard::shard_segments(source, keep);
    const auto half = moeshard::Model::load(segments.front(), "every second expert");
    const std::string sharded = answer(half, prompt, nullptr);
    std::printf("shard: %s\n", sharded.c_str());
    std::printf("%llu of %llu bytes of weights, %s\n", static_cast<unsigned long long>(half->n_bytes()),
                static_cast<unsigned long long>(whole->n_bytes()),
                masked == sharded ? "the same answer" : "ANOTHER ANSWER");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s MODEL.gguf [PROMPT]\n", argv[0]);
        return 2;
    }
    try {
        run(argv[1], argc > 2 ? argv[2] : "Once upon a time");
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
