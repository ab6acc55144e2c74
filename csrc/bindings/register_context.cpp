#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "bindings/arrays.hpp"
#include "bindings/interrupt.hpp"
#include "bindings/register.hpp"
#include "moeshard/context.hpp"
#include "moeshard/statistics.hpp"

using moeshard::Context;
using moeshard::ContextParams;
using moeshard::Input;
using moeshard::LayerTrace;
using moeshard::Outputs;
using moeshard::RoutingStatistics;
using moeshard::TraceOptions;
using moeshard::UbatchTrace;

namespace {

std::shared_ptr<Context> make(std::shared_ptr<moeshard::Model> model, int32_t n_ctx, int32_t n_batch, int32_t n_ubatch,
                              int32_t n_seq_max, int32_t n_threads, bool states) {
    ContextParams params;
    params.n_ctx = n_ctx;
    params.n_batch = n_batch;
    params.n_ubatch = n_ubatch;
    params.n_seq_max = n_seq_max;
    params.n_threads = n_threads;
    params.states = states;
    std::shared_ptr<Context> context;
    {
        const py::gil_scoped_release nogil;
        context = std::make_shared<Context>(std::move(model), params);
    }
    context->set_interrupt(python_signal_pending);
    return context;
}

Outputs to_outputs(const std::string& name) {
    if (name == "none") return Outputs::kNone;
    if (name == "last") return Outputs::kLast;
    if (name == "all") return Outputs::kAll;
    throw moeshard::Error("outputs must be 'none', 'last' or 'all', not '" + name + "'");
}

// The tokens of each sequence, kept alive while they are computed.
struct Inputs {
    Inputs(const std::vector<std::pair<int32_t, TokenArray>>& arrays, Outputs outputs) {
        for (const auto& [seq, array] : arrays) {
            tokens.push_back(to_tokens(array));
            inputs.push_back({seq, nullptr, tokens.back().size(), outputs});
        }
        for (size_t i = 0; i < inputs.size(); ++i) inputs[i].tokens = tokens[i].data();
    }

    std::vector<std::vector<int32_t>> tokens;
    std::vector<Input> inputs;
};

// Computes and returns one array of logits per input: (n_tokens, n_vocab), (1, n_vocab) or (0, n_vocab).
std::vector<py::array_t<float>> decode(Context& context, const std::vector<std::pair<int32_t, TokenArray>>& arrays,
                                       const std::string& outputs) {
    const Inputs given(arrays, to_outputs(outputs));
    const auto n_vocab = static_cast<py::ssize_t>(context.model().n_vocab());
    std::vector<py::array_t<float>> logits;
    std::vector<float*> data;
    for (const Input& input : given.inputs) {
        const auto n_tokens = static_cast<py::ssize_t>(input.n_tokens);
        const py::ssize_t rows = input.outputs == Outputs::kAll    ? n_tokens
                                 : input.outputs == Outputs::kLast ? std::min<py::ssize_t>(n_tokens, 1)
                                                                   : 0;
        logits.emplace_back(std::vector<py::ssize_t>{rows, n_vocab});
        data.push_back(logits.back().mutable_data());
    }
    const bool all = outputs == "all";
    const py::gil_scoped_release nogil;
    context.decode(given.inputs, [&](size_t input, size_t token, const float* row) {
        std::memcpy(data[input] + (all ? token : 0) * static_cast<size_t>(n_vocab), row,
                    static_cast<size_t>(n_vocab) * sizeof(float));
    });
    return logits;
}

// An array of n_tokens rows that owns the vector, or None.
py::object rows(std::vector<float>&& values, py::ssize_t n_tokens, py::ssize_t n_used = 0) {
    if (values.empty()) return py::none();
    const auto n = static_cast<py::ssize_t>(values.size()) / n_tokens;
    if (n_used == 0) return take(std::move(values), {n_tokens, n});
    return take(std::move(values), {n_tokens, n_used, n / n_used});
}

// (seq, pos, [(layer, ids, weights, probs, norms, inputs, hidden, residual, scaled), ...]) as arrays that own the
// trace's memory; None for those that nobody asked for.
py::tuple to_python(UbatchTrace& trace) {
    const auto n_tokens = static_cast<py::ssize_t>(trace.n_tokens());
    py::list layers;
    for (LayerTrace& layer : trace.layers) {
        const py::ssize_t n_used = layer.n_used;
        py::object probs = py::none();
        py::object norms = py::none();
        if (!layer.probs.empty()) probs = take(std::move(layer.probs), {n_tokens, layer.n_expert});
        if (!layer.norms.empty()) norms = take(std::move(layer.norms), {n_tokens, n_used});
        layers.append(py::make_tuple(
            layer.layer, take(std::move(layer.ids), {n_tokens, n_used}),
            take(std::move(layer.weights), {n_tokens, n_used}), probs, norms, rows(std::move(layer.inputs), n_tokens),
            rows(std::move(layer.hidden), n_tokens, n_used), rows(std::move(layer.residual), n_tokens), layer.scaled));
    }
    return py::make_tuple(take(std::move(trace.seq), {n_tokens}), take(std::move(trace.pos), {n_tokens}), layers);
}

void trace(Context& context, const std::vector<std::pair<int32_t, TokenArray>>& arrays, const py::function& sink,
           bool probs, bool norms, std::vector<int32_t> states) {
    const Inputs given(arrays, Outputs::kNone);
    const py::gil_scoped_release nogil;
    context.trace(given.inputs, TraceOptions{probs, norms, std::move(states)}, [&](UbatchTrace& ubatch) {
        const py::gil_scoped_acquire gil;
        const py::tuple arguments = to_python(ubatch);
        sink(*arguments);
    });
}

// (count, mass, saliency, energy, entropy, peak, together, cosaliency), summed per input; see RoutingStatistics. The
// last two are None without `pairs`.
py::tuple measure(Context& context, const std::vector<std::pair<int32_t, TokenArray>>& arrays,
                  const std::vector<int32_t>& layers, bool scores_are_logits, bool pairs) {
    const Inputs given(arrays, Outputs::kNone);
    const int32_t n_expert = context.model().routing().n_expert;
    RoutingStatistics sums(context.n_seq_max(), layers, n_expert, scores_are_logits, pairs);
    {
        const py::gil_scoped_release nogil;
        context.trace(given.inputs, TraceOptions{true, true, {}}, [&](const UbatchTrace& ubatch) { sums.add(ubatch); });
    }
    const py::ssize_t s = sums.n_seq();
    const auto m = static_cast<py::ssize_t>(layers.size());
    const py::ssize_t e = n_expert;
    py::object together = py::none();
    py::object cosaliency = py::none();
    if (pairs) {
        together = take(std::move(sums.together), {m, e, e});
        cosaliency = take(std::move(sums.cosaliency), {m, e, e});
    }
    return py::make_tuple(take(std::move(sums.count), {s, m, e}), take(std::move(sums.mass), {s, m, e}),
                          take(std::move(sums.saliency), {s, m, e}), take(std::move(sums.energy), {s, m, e}),
                          take(std::move(sums.entropy), {s, m}), take(std::move(sums.peak), {m, e}), together,
                          cosaliency);
}

py::array_t<float> array_of(const std::vector<float>& values) {
    return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<float> missed_by_layer(const Context& context, int32_t seq) {
    const std::vector<float>& values = context.missed_by_layer(seq);
    const auto n_layers = static_cast<py::ssize_t>(context.model().routing().moe_layers().size());
    const auto n_tokens = n_layers == 0 ? 0 : static_cast<py::ssize_t>(values.size()) / n_layers;
    return py::array_t<float>(std::vector<py::ssize_t>{n_tokens, n_layers}, values.data());
}

}  // namespace

void register_context(py::module_& m) {
    py::class_<Context, std::shared_ptr<Context>>(m, "Context", "Sequences of tokens, with a keep for each.")
        .def(py::init(&make), py::arg("model"), py::kw_only(), py::arg("n_ctx") = 0, py::arg("n_batch") = 2048,
             py::arg("n_ubatch") = 512, py::arg("n_seq_max") = 1, py::arg("n_threads") = 0, py::arg("states") = false)
        .def_property_readonly("n_ctx", &Context::n_ctx)
        .def_property_readonly("capacity", &Context::capacity)
        .def("limit", &Context::limit, py::arg("n_ctx"))
        .def_property_readonly("n_seq_max", &Context::n_seq_max)
        .def_property_readonly("n_graph_reuses", &Context::n_graph_reuses)
        .def_property_readonly(
            "memory",
            [](const Context& context) {
                const moeshard::MemoryUse use = context.memory();
                return py::make_tuple(use.model, use.context, use.compute);
            },
            "(model, context, compute): bytes allocated, or that a simulated model would allocate")
        .def("n_past", &Context::n_past, py::arg("seq") = 0)
        .def(
            "set_keep",
            [](Context& context, const std::optional<KeepArray>& array, int32_t seq) {
                const auto keep = to_keep(array);
                context.set_keep(keep ? &*keep : nullptr, seq);
            },
            py::arg("keep").none(true), py::arg("seq") = -1)
        .def("set_meter", &Context::set_meter, py::arg("on"))
        .def(
            "missed", [](const Context& context, int32_t seq) { return array_of(context.missed(seq)); },
            py::arg("seq") = 0)
        .def("missed_by_layer", &missed_by_layer, py::arg("seq") = 0)
        .def("decode", &decode, py::arg("inputs"), py::arg("outputs") = "last")
        .def("trace", &trace, py::arg("inputs"), py::arg("sink"), py::arg("probs") = false, py::arg("norms") = false,
             py::arg("states") = std::vector<int32_t>())
        .def("measure", &measure, py::arg("inputs"), py::arg("layers"), py::arg("scores_are_logits") = false,
             py::arg("pairs") = true)
        .def("reset", &Context::reset, py::arg("seq") = -1)
        .def("abort", &Context::abort);
}
