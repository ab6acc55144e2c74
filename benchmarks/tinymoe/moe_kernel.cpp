// Grouped matrix products of the expert layer for training on CPUs: gathers the rows an expert got, runs
// its three products on a block of rows that stays in cache, and adds the weighted result back.
//
// Every thread takes a contiguous share of the tokens and all experts, so that no two threads write the same
// output row; the gradients of the weights are summed per thread and added at the end.
//
// Shapes: T tokens, D width, F expert width, E experts, K experts per token.
//   x (T, D) · index (T, K) int64 · gate (T, K) · up_gate (E, 2F, D) [gate rows, then up rows] · down (E, D, F)

#include <torch/extension.h>

#include <omp.h>

#include <cmath>
#include <cstring>
#include <vector>

// The BLAS that torch carries (32-bit integers); inside a parallel region it runs on the calling thread.
extern "C" void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha,
                       const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                       const int* ldc);

namespace {

// Rows of one block: its scratch (2F + F + 2D floats a row) stays within a core's second-level cache.
constexpr int64_t kBlock = 128;

// C (m, n) = beta * C + op(A) (m, k) * op(B) (k, n), all row-major: BLAS sees the transposed product.
void product(bool ta, bool tb, int m, int n, int k, const float* a, int lda, const float* b, int ldb, float beta,
             float* c, int ldc) {
    const float one = 1.0f;
    sgemm_(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &ldc);
}

// The (token, slot) pairs of tokens [begin, end), grouped by expert.
struct Groups {
    std::vector<int64_t> start;  // E + 1 offsets into `pair`
    std::vector<int64_t> pair;   // token * K + slot

    Groups(const int64_t* index, int64_t begin, int64_t end, int64_t K, int64_t E)
        : start(E + 1, 0), pair((end - begin) * K) {
        for (int64_t i = begin * K; i < end * K; ++i) ++start[index[i] + 1];
        for (int64_t e = 0; e < E; ++e) start[e + 1] += start[e];
        std::vector<int64_t> at(start.begin(), start.end() - 1);
        for (int64_t i = begin * K; i < end * K; ++i) pair[at[index[i]]++] = i;
    }
};

// Silu(g) * u over n rows of `ug` (n, 2F) into `h` (n, F).
void activate(const float* ug, float* h, int64_t n, int64_t F) {
    for (int64_t r = 0; r < n; ++r) {
        const float* g = ug + r * 2 * F;
        for (int64_t j = 0; j < F; ++j) h[r * F + j] = g[j] / (1.0f + std::exp(-g[j])) * g[F + j];
    }
}

// Runs `body(groups, thread)` on every thread, tokens split over threads.
template <typename Body>
void for_shares(const at::Tensor& index, int64_t E, Body body) {
    const int64_t T = index.size(0), K = index.size(1);
    const int threads = at::get_num_threads();
#pragma omp parallel num_threads(threads)
    {
        const int64_t id = omp_get_thread_num(), of = omp_get_num_threads();
        const Groups groups(index.const_data_ptr<int64_t>(), T * id / of, T * (id + 1) / of, K, E);
        body(groups, static_cast<int>(id));
    }
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& index, const at::Tensor& gate, const at::Tensor& up_gate,
                   const at::Tensor& down) {
    const int64_t D = x.size(1), K = index.size(1), E = down.size(0), F = down.size(2);
    at::Tensor out = at::zeros_like(x);
    const float *px = x.const_data_ptr<float>(), *pg = gate.const_data_ptr<float>();
    const float *pu = up_gate.const_data_ptr<float>(), *pd = down.const_data_ptr<float>();
    float* po = out.data_ptr<float>();
    for_shares(index, E, [&](const Groups& groups, int) {
        std::vector<float> rows(kBlock * D), ug(kBlock * 2 * F), h(kBlock * F), y(kBlock * D);
        for (int64_t e = 0; e < E; ++e) {
            for (int64_t b = groups.start[e]; b < groups.start[e + 1]; b += kBlock) {
                const int64_t n = std::min(kBlock, groups.start[e + 1] - b);
                const int64_t* pair = groups.pair.data() + b;
                for (int64_t r = 0; r < n; ++r) std::memcpy(&rows[r * D], px + pair[r] / K * D, D * sizeof(float));
                product(false, true, n, 2 * F, D, rows.data(), D, pu + e * 2 * F * D, D, 0.0f, ug.data(), 2 * F);
                activate(ug.data(), h.data(), n, F);
                product(false, true, n, D, F, h.data(), F, pd + e * D * F, F, 0.0f, y.data(), D);
                for (int64_t r = 0; r < n; ++r) {
                    float* o = po + pair[r] / K * D;
                    const float w = pg[pair[r]];
                    for (int64_t j = 0; j < D; ++j) o[j] += w * y[r * D + j];
                }
            }
        }
    });
    return out;
}

// Gradients of x, gate, up_gate, down. The hidden rows are computed again instead of kept: they cost a third
// of the forward pass and would be the largest tensors of the model.
std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& index,
                                 const at::Tensor& gate, const at::Tensor& up_gate, const at::Tensor& down) {
    const int64_t D = x.size(1), K = index.size(1), E = down.size(0), F = down.size(2);
    const int threads = at::get_num_threads();
    at::Tensor dx = at::zeros_like(x), dgate = at::empty_like(gate);
    std::vector<at::Tensor> dup(threads), ddown(threads);
    for (int t = 0; t < threads; ++t) {
        dup[t] = at::zeros_like(up_gate);
        ddown[t] = at::zeros_like(down);
    }
    const float *pgrad = grad.const_data_ptr<float>(), *px = x.const_data_ptr<float>();
    const float *pg = gate.const_data_ptr<float>(), *pu = up_gate.const_data_ptr<float>();
    const float* pd = down.const_data_ptr<float>();
    float *pdx = dx.data_ptr<float>(), *pdg = dgate.data_ptr<float>();
    for_shares(index, E, [&](const Groups& groups, int thread) {
        float *pdu = dup[thread].data_ptr<float>(), *pdd = ddown[thread].data_ptr<float>();
        std::vector<float> rows(kBlock * D), dy(kBlock * D), ug(kBlock * 2 * F), h(kBlock * F), dh(kBlock * F);
        for (int64_t e = 0; e < E; ++e) {
            const float *wu = pu + e * 2 * F * D, *wd = pd + e * D * F;
            for (int64_t b = groups.start[e]; b < groups.start[e + 1]; b += kBlock) {
                const int64_t n = std::min(kBlock, groups.start[e + 1] - b);
                const int64_t* pair = groups.pair.data() + b;
                for (int64_t r = 0; r < n; ++r) {
                    std::memcpy(&rows[r * D], px + pair[r] / K * D, D * sizeof(float));
                    std::memcpy(&dy[r * D], pgrad + pair[r] / K * D, D * sizeof(float));
                }
                product(false, true, n, 2 * F, D, rows.data(), D, wu, D, 0.0f, ug.data(), 2 * F);
                activate(ug.data(), h.data(), n, F);
                // y = w * down(h): d/dw = grad . down(h) = (down^T grad) . h, so down(h) itself is not needed.
                product(false, false, n, F, D, dy.data(), D, wd, F, 0.0f, dh.data(), F);
                for (int64_t r = 0; r < n; ++r) {
                    const float w = pg[pair[r]];
                    float dot = 0.0f;
                    float *g = &ug[r * 2 * F], *u = g + F, *hr = &h[r * F], *dhr = &dh[r * F];
                    for (int64_t j = 0; j < F; ++j) {
                        dot += dhr[j] * hr[j];
                        const float s = 1.0f / (1.0f + std::exp(-g[j])), d = w * dhr[j], act = g[j] * s;
                        const float du = d * act, dg = d * u[j] * s * (1.0f + g[j] * (1.0f - s));
                        hr[j] *= w;
                        u[j] = du;
                        g[j] = dg;
                    }
                    pdg[pair[r]] = dot;
                }
                product(true, false, D, F, n, dy.data(), D, h.data(), F, 1.0f, pdd + e * D * F, F);
                product(true, false, 2 * F, D, n, ug.data(), 2 * F, rows.data(), D, 1.0f, pdu + e * 2 * F * D, D);
                product(false, false, n, D, 2 * F, ug.data(), 2 * F, wu, D, 0.0f, rows.data(), D);
                for (int64_t r = 0; r < n; ++r) {
                    float* o = pdx + pair[r] / K * D;
                    for (int64_t j = 0; j < D; ++j) o[j] += rows[r * D + j];
                }
            }
        }
    });
    for (int t = 1; t < threads; ++t) {
        dup[0].add_(dup[t]);
        ddown[0].add_(ddown[t]);
    }
    return {dx, dgate, dup[0], ddown[0]};
}

}  // namespace

void register_ops(pybind11::module_& m);
void register_attention(pybind11::module_& m);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("experts_forward", &forward);
    m.def("experts_backward", &backward);
    register_ops(m);
    register_attention(m);
}
