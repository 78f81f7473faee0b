// The machine's limits, for bench/floor.py: each function does its work on all threads and returns
// how many operations (or bytes) that was. Built with -march=native where it runs.
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>

#if defined(__AVX512F__)
using vec = __m512;
static vec set(float x) { return _mm512_set1_ps(x); }
static vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
using vec = __m256;
static vec set(float x) { return _mm256_set1_ps(x); }
static vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif

constexpr int64_t kLanes = sizeof(vec) / 4;
constexpr int kChains = 12;  // independent sums: latency times ports, and fits the registers
static volatile float sink;

// The compiler must take `x` for an unknown value: equal sums would be computed once.
template <class T>
static void hide(T& x) {
  asm volatile("" : "+v"(x));
}

extern "C" double fma_flops(int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    vec sums[kChains] = {}, a = set(1.f + 1e-7f), b = set(1e-9f);
    for (vec& s : sums) hide(s);
    for (int64_t i = 0; i < rounds; ++i)
      for (vec& s : sums) s = fma(a, b, s);
    for (vec& s : sums) sink = s[0];
  }
  return 2.0 * kLanes * kChains * rounds * threads;
}

extern "C" double bf16_dot_flops(int64_t rounds, int threads) {
#if defined(__AVX512BF16__)
#pragma omp parallel num_threads(threads)
  {
    __m512 sums[kChains] = {};
    for (__m512& s : sums) hide(s);
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.f), _mm512_set1_ps(1.f)), b = a;
    for (int64_t i = 0; i < rounds; ++i)
      for (__m512& s : sums) s = _mm512_dpbf16_ps(s, a, b);
    for (__m512& s : sums) sink = s[0];
  }
  return 4.0 * 16 * kChains * rounds * threads;
#else
  (void)rounds, (void)threads;
  return 0;
#endif
}

extern "C" double int8_dot_flops(int64_t rounds, int threads) {
#if defined(__AVX512VNNI__)
  using ivec = __m512i;
#else
  using ivec = __m256i;
#endif
#pragma omp parallel num_threads(threads)
  {
    ivec sums[kChains] = {}, a = {}, b = {};
    hide(a), hide(b);
    for (ivec& s : sums) hide(s);
    for (int64_t i = 0; i < rounds; ++i) {
      for (ivec& s : sums) {
#if defined(__AVX512VNNI__)
        s = _mm512_dpbusd_epi32(s, a, b);
#else
        hide(a);  // or the product would be taken out of the loop
        ivec pairs = _mm256_maddubs_epi16(a, b);
        s = _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
      }
    }
    for (ivec& s : sums) sink = static_cast<float>(s[0]);
  }
  return 2.0 * sizeof(ivec) * kChains * rounds * threads;
}

extern "C" double read_bytes(const float* data, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t step = 8 * kLanes, part = count / threads / step * step;
    const vec* p = reinterpret_cast<const vec*>(data + omp_get_thread_num() * part);
    vec sums[8] = {};
    for (int64_t i = 0; i < part / kLanes; i += 8)
      for (int j = 0; j < 8; ++j) sums[j] += p[i + j];
    for (vec& s : sums) sink = s[0];
  }
  return 4.0 * static_cast<double>(count);
}
