#include <pybind11/stl.h>

#include <memory>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "bindings/stop_reason.hpp"
#include "moeshard/batcher.hpp"
#include "moeshard/step_queue.hpp"

using moeshard::Batcher;
using moeshard::BatcherParams;
using moeshard::Progress;
using moeshard::Request;
using moeshard::StepQueue;
using moeshard::TokenLogprob;

namespace {

std::unique_ptr<Batcher> make(std::shared_ptr<moeshard::Model> model, int32_t n_slots, int32_t n_ctx, int32_t n_batch,
                              int32_t n_ubatch, int32_t n_threads, int32_t n_prefill, bool meter) {
    BatcherParams params;
    params.n_slots = n_slots;
    params.n_ctx = n_ctx;
    params.n_batch = n_batch;
    params.n_ubatch = n_ubatch;
    params.n_threads = n_threads;
    params.n_prefill = n_prefill;
    params.meter = meter;
    const py::gil_scoped_release nogil;
    return std::make_unique<Batcher>(std::move(model), params);
}

int64_t submit(Batcher& batcher, const TokenArray& prompt, const std::optional<KeepArray>& keep,
               const std::string& scope, int32_t max_tokens, std::vector<std::string> stop, bool ignore_end,
               int32_t n_logprobs, bool prompt_logprobs, const std::optional<moeshard::SamplingParams>& sampling) {
    Request request;
    request.prompt = to_tokens(prompt);
    if (auto given = to_keep(keep)) request.keep = std::make_shared<const moeshard::Keep>(std::move(*given));
    request.scope = scope;
    request.params.max_tokens = max_tokens;
    request.params.stop = std::move(stop);
    request.params.ignore_end = ignore_end;
    if (sampling) request.params.sampling = *sampling;
    request.n_logprobs = n_logprobs;
    request.prompt_logprobs = prompt_logprobs;
    const py::gil_scoped_release nogil;
    return batcher.submit(std::move(request));
}

int64_t move(Batcher& batcher, int64_t id, Batcher& to, const std::optional<KeepArray>& keep) {
    std::shared_ptr<const moeshard::Keep> wanted;
    if (auto given = to_keep(keep)) wanted = std::make_shared<const moeshard::Keep>(std::move(*given));
    const py::gil_scoped_release nogil;
    return batcher.move(id, to, std::move(wanted));
}

}  // namespace

void register_batcher(py::module_& m) {
    py::class_<TokenLogprob>(m, "TokenLogprob",
                             "A token with its log-probability, and the likeliest ones in its place.")
        .def_readonly("token", &TokenLogprob::token)
        .def_property_readonly("bytes", [](const TokenLogprob& found) { return py::bytes(found.bytes); })
        .def_readonly("logprob", &TokenLogprob::logprob)
        .def_readonly("top", &TokenLogprob::top);
    py::class_<Progress>(m, "Progress", "What a step of a Batcher did for one request.")
        .def_readonly("id", &Progress::id)
        .def_property_readonly("text", [](const Progress& progress) { return py::bytes(progress.text); })
        .def_readonly("logprobs", &Progress::logprobs)
        .def_readonly("n_prompt", &Progress::n_prompt)
        .def_readonly("n_prompt_done", &Progress::n_prompt_done)
        .def_readonly("n_cached", &Progress::n_cached)
        .def_readonly("n_generated", &Progress::n_generated)
        .def_readonly("token", &Progress::token)
        .def_readonly("missed", &Progress::missed)
        .def_property_readonly("stop_reason", [](const Progress& progress) { return reason_name(progress.reason); })
        .def_readonly("error", &Progress::error)
        .def_property_readonly("over", &Progress::over);
    py::class_<Batcher>(m, "Batcher", "Continuous batching: many requests, a token of each per step.")
        .def(py::init(&make), py::arg("model"), py::kw_only(), py::arg("n_slots") = 4, py::arg("n_ctx") = 0,
             py::arg("n_batch") = 2048, py::arg("n_ubatch") = 512, py::arg("n_threads") = 0, py::arg("n_prefill") = 512,
             py::arg("meter") = false)
        .def_property_readonly("n_slots", [](const Batcher& batcher) { return batcher.params().n_slots; })
        .def_property_readonly("n_ctx", [](const Batcher& batcher) { return batcher.params().n_ctx; })
        .def_property_readonly("n_free", &Batcher::n_free)
        .def_property_readonly("n_held", &Batcher::n_held)
        .def("submit", &submit, py::arg("prompt"), py::kw_only(), py::arg("keep").none(true) = py::none(),
             py::arg("scope") = "", py::arg("max_tokens") = 128, py::arg("stop") = std::vector<std::string>{},
             py::arg("ignore_end") = false, py::arg("n_logprobs") = -1, py::arg("prompt_logprobs") = false,
             py::arg("sampling") = py::none())
        .def("move", &move, py::arg("id"), py::arg("to"), py::arg("keep").none(true) = py::none())
        .def("cancel", &Batcher::cancel, py::arg("id"))
        .def("step", &Batcher::step, py::call_guard<py::gil_scoped_release>())
        .def("abort", &Batcher::abort)
        .def("forget", &Batcher::forget);
    py::class_<StepQueue>(m, "StepQueue", "Steps of batchers for a reader in another thread.")
        .def(py::init<int>(), py::arg("wake_fd") = -1)
        .def("run", &StepQueue::run, py::arg("batcher"), py::arg("n_steps") = 0, py::arg("seconds") = 1.0,
             py::call_guard<py::gil_scoped_release>())
        .def("interrupt", &StepQueue::interrupt)
        .def("take", &StepQueue::take);
}
