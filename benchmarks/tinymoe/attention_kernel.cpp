// Causal grouped-query attention for training on CPUs: one block of queries against the keys before it, so that
// half of the products are never made and the scores stay in cache. No transposed or repeated copies are needed.
//
// Shapes: q, out (B, T, H, S) · k, v (B, T, G, S), head h reads group h / (H / G) · norm (B, H, T): log-sum-exp.

#include <torch/extension.h>

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

extern "C" void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha,
                       const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                       const int* ldc);

namespace {

constexpr int kRows = 64;  // queries of one block

// C (m, n) = alpha * op(A) (m, k) * op(B) (k, n) + beta * C, all row-major: BLAS sees the transposed product.
void product(bool ta, bool tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
             float beta, float* c, int ldc) {
    sgemm_(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}

struct Shape {
    int B, T, H, G, S;
    float scale;

    Shape(const at::Tensor& q, const at::Tensor& k)
        : B(q.size(0)), T(q.size(1)), H(q.size(2)), G(k.size(2)), S(q.size(3)), scale(1.0f / std::sqrt(float(S))) {}
    int64_t query(int b, int t, int h) const { return ((int64_t(b) * T + t) * H + h) * S; }
    int64_t key(int b, int t, int g) const { return ((int64_t(b) * T + t) * G + g) * S; }
};

// Runs `body(b, g)` for every sequence and group of heads: all that writes one group's gradients is in one call.
template <typename Body>
void for_groups(const Shape& s, Body body) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(at::get_num_threads())
    for (int b = 0; b < s.B; ++b)
        for (int g = 0; g < s.G; ++g) body(b, g);
}

std::vector<at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const Shape s(q, k);
    at::Tensor out = at::empty_like(q), norm = at::empty({s.B, s.H, s.T}, q.options());
    const float *pq = q.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>();
    float *po = out.data_ptr<float>(), *pn = norm.data_ptr<float>();
    for_groups(s, [&](int b, int g) {
        std::vector<float> p(int64_t(kRows) * s.T);
        const int stride = s.H * s.S, kstride = s.G * s.S;
        for (int h = g * (s.H / s.G); h < (g + 1) * (s.H / s.G); ++h) {
            for (int t = 0; t < s.T; t += kRows) {
                const int n = std::min(kRows, s.T - t), keys = t + n;
                product(false, true, n, keys, s.S, s.scale, pq + s.query(b, t, h), stride, pk + s.key(b, 0, g), kstride,
                        0.0f, p.data(), keys);
                for (int r = 0; r < n; ++r) {
                    float* row = p.data() + int64_t(r) * keys;
                    const int seen = t + r + 1;
                    const float top = *std::max_element(row, row + seen);
                    float sum = 0.0f;
                    for (int j = 0; j < seen; ++j) sum += row[j] = std::exp(row[j] - top);
                    for (int j = 0; j < seen; ++j) row[j] /= sum;
                    std::fill(row + seen, row + keys, 0.0f);
                    pn[(int64_t(b) * s.H + h) * s.T + t + r] = top + std::log(sum);
                }
                product(false, false, n, s.S, keys, 1.0f, p.data(), keys, pv + s.key(b, 0, g), kstride, 0.0f,
                        po + s.query(b, t, h), stride);
            }
        }
    });
    return {out, norm};
}

// Gradients of q, k, v; the probabilities are made again from `norm`.
std::vector<at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const at::Tensor& out, const at::Tensor& norm) {
    const Shape s(q, k);
    at::Tensor dq = at::empty_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v);
    const float *pq = q.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>();
    const float *pg = grad.const_data_ptr<float>(), *po = out.const_data_ptr<float>();
    const float* pn = norm.const_data_ptr<float>();
    float *pdq = dq.data_ptr<float>(), *pdk = dk.data_ptr<float>(), *pdv = dv.data_ptr<float>();
    for_groups(s, [&](int b, int g) {
        std::vector<float> p(int64_t(kRows) * s.T), dp(int64_t(kRows) * s.T);
        const int stride = s.H * s.S, kstride = s.G * s.S;
        const float *keys0 = pk + s.key(b, 0, g), *values0 = pv + s.key(b, 0, g);
        for (int h = g * (s.H / s.G); h < (g + 1) * (s.H / s.G); ++h) {
            for (int t = 0; t < s.T; t += kRows) {
                const int n = std::min(kRows, s.T - t), keys = t + n;
                const int64_t at = s.query(b, t, h);
                product(false, true, n, keys, s.S, s.scale, pq + at, stride, keys0, kstride, 0.0f, p.data(), keys);
                product(false, true, n, keys, s.S, 1.0f, pg + at, stride, values0, kstride, 0.0f, dp.data(), keys);
                for (int r = 0; r < n; ++r) {
                    float *row = p.data() + int64_t(r) * keys, *drow = dp.data() + int64_t(r) * keys;
                    const int seen = t + r + 1;
                    const float total = pn[(int64_t(b) * s.H + h) * s.T + t + r];
                    float dot = 0.0f;
                    for (int j = 0; j < s.S; ++j) {
                        dot += pg[at + int64_t(r) * stride + j] * po[at + int64_t(r) * stride + j];
                    }
                    for (int j = 0; j < seen; ++j) {
                        row[j] = std::exp(row[j] - total);
                        drow[j] = row[j] * (drow[j] - dot) * s.scale;
                    }
                    std::fill(row + seen, row + keys, 0.0f);
                    std::fill(drow + seen, drow + keys, 0.0f);
                }
                product(true, false, keys, s.S, n, 1.0f, p.data(), keys, pg + at, stride, 1.0f, pdv + s.key(b, 0, g),
                        kstride);
                product(false, false, n, s.S, keys, 1.0f, dp.data(), keys, keys0, kstride, 0.0f, pdq + at, stride);
                product(true, false, keys, s.S, n, 1.0f, dp.data(), keys, pq + at, stride, 1.0f, pdk + s.key(b, 0, g),
                        kstride);
            }
        }
    });
    return {dq, dk, dv};
}

}  // namespace

void register_attention(pybind11::module_& m) {
    m.def("attention_forward", &attention_forward);
    m.def("attention_backward", &attention_backward);
}
