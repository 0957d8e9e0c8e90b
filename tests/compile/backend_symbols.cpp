// SPDX-License-Identifier: Apache-2.0
// Every function of every backend, instantiated for the check of symbols; compiled, never run.
#include "backends.hpp"

namespace {

using namespace magicpig;

template <class Ops, class T>
void use_rows(const Rows<T>& rows, const float* in, float* out) {
  Ops::dot_rows(rows, in, 1, out);
  Ops::add_rows(rows, in, 1, out);
}

}  // namespace

float use_all_backends(const float* in, float* out, int n) {
  test::for_each_backend([&]<class Ops>() {
    use_rows<Ops, float>({}, in, out);
    use_rows<Ops, fp16>({}, in, out);
    use_rows<Ops, bf16>({}, in, out);
    use_rows<Ops, q8_0>({}, in, out);
    use_rows<Ops, q4_0>({}, in, out);
    Ops::project({}, in, n, out);
    Ops::log_affine_exp(out, n, 1.0F, 1.0F);
    Ops::interpolate({}, out, n);
    out[0] += (Ops::max)(in, n) + Ops::exp_sum(out, n, 1.0F);
  });
  return out[0];
}
