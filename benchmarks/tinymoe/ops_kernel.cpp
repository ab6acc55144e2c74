// Root-mean-square norm and rotary positions, each in one pass over its rows (torch's CPU paths make six).

#include <torch/extension.h>

#include <omp.h>

#include <cmath>
#include <vector>

namespace {

// y = x / rms(x) * weight over rows of x (N, D); also 1 / rms, (N,).
std::vector<at::Tensor> norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
    const int64_t D = x.size(-1), N = x.numel() / D;
    at::Tensor y = at::empty_like(x), inverse = at::empty({N}, x.options());
    const float *px = x.const_data_ptr<float>(), *pw = weight.const_data_ptr<float>();
    float *py = y.data_ptr<float>(), *pi = inverse.data_ptr<float>();
#pragma omp parallel for num_threads(at::get_num_threads())
    for (int64_t r = 0; r < N; ++r) {
        const float* a = px + r * D;
        float sum = 0.0f;
        for (int64_t j = 0; j < D; ++j) sum += a[j] * a[j];
        const float s = 1.0f / std::sqrt(sum / D + static_cast<float>(eps));
        pi[r] = s;
        for (int64_t j = 0; j < D; ++j) py[r * D + j] = a[j] * s * pw[j];
    }
    return {y, inverse};
}

// Gradients of x and weight.
std::vector<at::Tensor> norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& inverse) {
    const int64_t D = x.size(-1), N = x.numel() / D;
    const int threads = at::get_num_threads();
    at::Tensor dx = at::empty_like(x), dw = at::zeros({threads, D}, x.options());
    const float *pg = grad.const_data_ptr<float>(), *px = x.const_data_ptr<float>();
    const float *pw = weight.const_data_ptr<float>(), *pi = inverse.const_data_ptr<float>();
    float *pdx = dx.data_ptr<float>(), *pdw = dw.data_ptr<float>();
#pragma omp parallel num_threads(threads)
    {
        float* own = pdw + omp_get_thread_num() * D;
#pragma omp for
        for (int64_t r = 0; r < N; ++r) {
            const float *a = px + r * D, *g = pg + r * D;
            const float s = pi[r];
            float dot = 0.0f;
            for (int64_t j = 0; j < D; ++j) {
                dot += g[j] * pw[j] * a[j];
                own[j] += g[j] * a[j] * s;
            }
            const float c = dot * s * s / D;
            for (int64_t j = 0; j < D; ++j) pdx[r * D + j] = s * (g[j] * pw[j] - a[j] * c);
        }
    }
    return {dx, dw.sum(0)};
}

// Rotates rows of x (B, T, H, S), halves paired; `sign` -1 turns back (the gradient). cos, sin (T, S / 2).
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double sign) {
    const int64_t T = x.size(1), H = x.size(2), S = x.size(3), half = S / 2, N = x.numel() / S;
    at::Tensor y = at::empty_like(x);
    const float *px = x.const_data_ptr<float>(), *pc = cos.const_data_ptr<float>(), *ps = sin.const_data_ptr<float>();
    float* py = y.data_ptr<float>();
    const float f = static_cast<float>(sign);
#pragma omp parallel for num_threads(at::get_num_threads())
    for (int64_t r = 0; r < N; ++r) {
        const float *a = px + r * S, *c = pc + r / H % T * half, *s = ps + r / H % T * half;
        float* o = py + r * S;
        for (int64_t j = 0; j < half; ++j) {
            o[j] = a[j] * c[j] - f * a[j + half] * s[j];
            o[j + half] = a[j + half] * c[j] + f * a[j] * s[j];
        }
    }
    return y;
}

}  // namespace

void register_ops(pybind11::module_& m) {
    m.def("norm_forward", &norm_forward);
    m.def("norm_backward", &norm_backward);
    m.def("rotate", &rotate);
}
