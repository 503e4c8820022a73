// fusedpeft._C: addresses, sizes, strides and streams cross as integers, so that one build serves
// every torch. The callers (pyext/ops) own the tensors and check dtypes, devices and shapes; here
// only what would crash is refused.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "build_info.h"  // written by setup.py
#include "checks.h"
#include "cpu/cpu.h"
#include "pool.h"
#if FUSEDPEFT_CUDA
#include "cuda/adapter_decode.h"
#include "cuda/multi_lora.h"
#include "cuda/prefix_decode.h"
#endif

namespace py = pybind11;
using std::int64_t;
using Address = std::uintptr_t;  // Tensor.data_ptr(), or 0 for none

namespace fusedpeft {
namespace {

using Strides = std::array<int64_t, 3>;  // of the first three dims; the last has stride 1

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void lora_decode(Address x, Address w, Address a, Address b, Address bias, Address y, int64_t m,
                 int64_t k, int64_t n, int64_t r, int64_t sx, int64_t sw, int64_t sa, int64_t sb,
                 int64_t sy, double scale, int dtype, int adapter_dtype) {
  check_matrix("x", x, m, k, sx);
  check_matrix("w", w, n, k, sw);
  check_matrix("a", a, r, k, sa);
  check_matrix("b", b, n, r, sb);
  check_matrix("y", y, m, n, sy);
  py::gil_scoped_release release;
  cpu::lora_decode(pointer(x), pointer(w), pointer(a), pointer(b), pointer(bias), pointer(y), m, k,
                   n, r, sx, sw, sa, sb, sy, scale, dtype, adapter_dtype);
}

// of_weight: the codes, then what scales them, as cpu::Quantised says; 0 for none.
cpu::Quantised quantised(const std::array<Address, 5>& of_weight, int64_t n, int64_t k, int64_t block,
                         bool by_row) {
  const auto floats = [&](int i) { return static_cast<const float*>(pointer(of_weight[i])); };
  check(n >= 0 && k >= 0, "w: expected sizes >= 0, got [", n, ", ", k, "]");
  check((of_weight[0] && of_weight[1]) || n == 0 || k == 0, "w: expected addresses, got null");
  check(!of_weight[2] || (of_weight[3] && of_weight[4]),
        "w: expected absmax2 and offset beside a book, got null");
  return {static_cast<const std::uint8_t*>(pointer(of_weight[0])), pointer(of_weight[1]), floats(2),
          floats(3), floats(4), n, k, block, by_row};
}

void dequantise(const std::array<Address, 5>& of_weight, int64_t n, int64_t k, int64_t block,
                bool by_row, Address out, int64_t row, int64_t rows, int64_t col, int64_t cols,
                int64_t so, int dtype) {
  const cpu::Quantised w = quantised(of_weight, n, k, block, by_row);
  check_matrix("out", out, rows, cols, so);
  py::gil_scoped_release release;
  cpu::dequantise(w, pointer(out), row, rows, col, cols, so, dtype);
}

void lora_decode_quantised(Address x, const std::array<Address, 5>& of_weight, Address a, Address b,
                           Address bias, Address y, int64_t m, int64_t k, int64_t n, int64_t block,
                           bool by_row, int64_t r, int64_t sx, int64_t sa, int64_t sb, int64_t sy,
                           double scale, int dtype, int adapter_dtype) {
  const cpu::Quantised w = quantised(of_weight, n, k, block, by_row);
  check_matrix("x", x, m, k, sx);
  check_matrix("a", a, r, k, sa);
  check_matrix("b", b, n, r, sb);
  check_matrix("y", y, m, n, sy);
  py::gil_scoped_release release;
  cpu::lora_decode_quantised(pointer(x), w, pointer(a), pointer(b), pointer(bias), pointer(y), m, r,
                             sx, sa, sb, sy, scale, dtype, adapter_dtype);
}

void multi_lora(Address x, Address w, Address bias, Address y, Address slots, Address a, Address b,
                Address rank, Address scale, const std::vector<int64_t>& sizes, int64_t count,
                int64_t max_rank, int64_t m, int64_t k, int64_t n, int64_t sx, int64_t sw, int64_t sy,
                int64_t a_slot, int64_t a_row, int64_t b_slot, int dtype, int adapter_dtype) {
  const auto parts = static_cast<int64_t>(sizes.size());
  check_matrix("x", x, m, k, sx);
  check_matrix("w", w, n, k, sw);
  check_matrix("y", y, m, n, sy);
  check_matrix("slots", slots, m, 1, 1);
  check_matrix("rank", rank, count, parts, parts);
  check_matrix("scale", scale, count, parts, parts);
  check_matrix("a", a, count, parts * max_rank * k, a_slot);
  check_matrix("b", b, count, n * max_rank, b_slot);
  const cpu::LoraSlots pool = {pointer(a), pointer(b), static_cast<const int32_t*>(pointer(rank)),
                               static_cast<const float*>(pointer(scale)), sizes.data(), count, parts,
                               max_rank, a_slot, a_row, b_slot};
  py::gil_scoped_release release;
  cpu::multi_lora(pointer(x), pointer(w), pointer(bias), pointer(y),
                  static_cast<const int32_t*>(pointer(slots)), pool, m, k, n, sx, sw, sy, dtype,
                  adapter_dtype);
}

void linear(Address x, Address w, Address bias, Address y, int64_t m, int64_t k, int64_t n, int64_t sx,
            int64_t sw, int dtype) {
  check_matrix("x", x, m, k, sx);
  check_matrix("w", w, n, k, sw);
  check_matrix("y", y, m, n, n);
  py::gil_scoped_release release;
  cpu::linear(pointer(x), pointer(w), pointer(bias), pointer(y), m, k, n, sx, sw, n, dtype);
}

void rms_norm(Address x, Address weight, Address dy, Address out, int64_t m, int64_t d, double eps,
              double offset, int dtype) {
  check_matrix("x", x, m, d, d);
  check_matrix("weight", weight, 1, d, d);
  check_matrix("out", out, m, d, d);
  py::gil_scoped_release release;
  cpu::rms_norm({pointer(x), pointer(weight), pointer(dy), pointer(out), m, d,
                 static_cast<float>(eps), static_cast<float>(offset), dtype});
}

void gated(Address gate, int64_t gate_row, Address up, int64_t up_row, Address dy, Address out,
           Address dup, int64_t rows, int64_t width, int activation, int dtype) {
  check_matrix("gate", gate, rows, width, gate_row);
  check_matrix("up", up, rows, width, up_row);
  check_matrix("out", out, rows, width, width);
  check(!dy || dup, "dup: expected an address beside dy, got null");
  py::gil_scoped_release release;
  cpu::gated({pointer(gate), pointer(up), pointer(dy), pointer(out), pointer(dup), rows, width,
              gate_row, up_row, activation, dtype});
}

void rotary(Address x, Strides sx, Address cos, Strides sc, Address sin, Strides ss, Address out,
            Strides so, int64_t b, int64_t h, int64_t t, int64_t d, bool backward, int dtype) {
  check(b * h * t == 0 || (x && cos && sin && out),
        "x, cos, sin, out: expected addresses, got null");
  py::gil_scoped_release release;
  cpu::rotary({pointer(x), pointer(cos), pointer(sin), pointer(out), b, h, t, d, sx[0], sx[1], sx[2],
               sc[0], sc[2], ss[0], ss[2], so[0], so[1], so[2], backward, dtype});
}

void softmax(Address z, Address lse, int64_t rows, int64_t cols, bool write) {
  check_matrix("z", z, rows, cols, cols);
  check_matrix("lse", lse, 1, rows, rows);
  py::gil_scoped_release release;
  cpu::softmax(static_cast<float*>(pointer(z)), static_cast<float*>(pointer(lse)), rows, cols, write);
}

void dropout(Address x, Address out, int64_t rows, int64_t cols, int64_t sx, int64_t so, double p,
             int64_t seed, int dtype) {
  check_matrix("x", x, rows, cols, sx);
  check_matrix("out", out, rows, cols, so);
  check(p >= 0.0 && p < 1.0, "p: expected 0 <= p < 1, got ", p);
  py::gil_scoped_release release;
  cpu::dropout(pointer(x), pointer(out), rows, cols, sx, so, p, seed, dtype);
}

void adapter_decode(Address x, Address residual, Address y, Address slots, Address size,
                    Address scale, Address down, Address down_bias, Address up, Address up_bias,
                    Address norm_weight, Address norm_bias, int64_t count, int64_t m, int64_t d,
                    int64_t sx, int64_t sr, int64_t down_slot, int64_t down_bias_slot, int64_t up_slot, int64_t up_bias_slot,
                    int64_t norm_weight_slot, int64_t norm_bias_slot, double eps, int norm, int activation, int dtype,
                    int adapter_dtype, int64_t max_size) {
  check_matrix("x", x, m, d, sx);
  check_matrix("y", y, m, d, d);
  check(count == 0 || (size && scale && down && up), "pool: expected addresses, got null");
  py::gil_scoped_release release;
  cpu::adapter_decode({pointer(x), pointer(residual), pointer(y),
                       static_cast<const int32_t*>(pointer(slots)),
                       static_cast<const int32_t*>(pointer(size)),
                       static_cast<const float*>(pointer(scale)), pointer(down),
                       pointer(down_bias), pointer(up), pointer(up_bias), pointer(norm_weight),
                       pointer(norm_bias), count, m, d, sx, sr, d, d, 0, down_slot,
                       down_bias_slot, up_slot, up_bias_slot, norm_weight_slot, norm_bias_slot,
                       static_cast<float>(eps), norm, activation, dtype, adapter_dtype, max_size});
}

void adapter_decode_one(Address x, Address residual, Address y, Address down, Address down_bias,
                        Address up, Address up_bias, Address norm_weight, Address norm_bias,
                        int64_t m, int64_t d, int64_t e, int64_t sx, int64_t sr, int64_t sd,
                        int64_t su, double scale, double eps, int norm, int activation, int dtype,
                        int adapter_dtype) {
  check_matrix("x", x, m, d, sx);
  check_matrix("y", y, m, d, d);
  check_matrix("down", down, e, d, sd);
  check_matrix("up", up, d, e, su);
  check(e < int64_t{1} << 31, "e: expected < 2^31, got ", e);
  const auto size = static_cast<int32_t>(e);
  const auto factor = static_cast<float>(scale);
  py::gil_scoped_release release;
  cpu::adapter_decode({pointer(x), pointer(residual), pointer(y), nullptr, &size, &factor,
                       pointer(down), pointer(down_bias), pointer(up), pointer(up_bias),
                       pointer(norm_weight), pointer(norm_bias), 1, m, d, sx, sr, d, sd, su, 0, 0,
                       0, 0, 0, 0, static_cast<float>(eps), norm, activation, dtype,
                       adapter_dtype, e});
}

// of_weights: D, c, U, e, the norm's weight and bias. Of the gradients: dx, then theirs.
void adapter_train(Address x, Address residual, const std::array<Address, 6>& of_weights, Address y,
                   Address p, Address stats, int64_t m, int64_t d, int64_t e, double scale, double eps,
                   int norm, int activation, int dtype, int adapter_dtype, Address dy,
                   const std::array<Address, 7>& gradients, Address work, bool add_dy) {
  check_matrix("x", x, m, d, d);
  check_matrix("down", of_weights[0], e, d, d);
  check_matrix("up", of_weights[2], d, e, e);
  check_matrix("p", p, m, e, e);
  check_matrix("stats", stats, norm ? m : 0, 2, 2);
  if (dy) {
    check_matrix("work", work, 2 * m, e, e);
  } else {
    check_matrix("y", y, m, d, d);
  }
  const auto& w = of_weights;
  const auto& g = gradients;
  py::gil_scoped_release release;
  cpu::adapter_train({pointer(x), pointer(residual), pointer(w[0]), pointer(w[1]), pointer(w[2]),
                      pointer(w[3]), pointer(w[4]), pointer(w[5]), pointer(y), pointer(p),
                      static_cast<float*>(pointer(stats)), m, d, e, static_cast<float>(scale),
                      static_cast<float>(eps), norm, activation, dtype, adapter_dtype, pointer(dy),
                      pointer(g[0]), pointer(g[1]), pointer(g[2]), pointer(g[3]), pointer(g[4]),
                      pointer(g[5]), pointer(g[6]), static_cast<float*>(pointer(work)), add_dy});
}

void check_keys(const char* name, Address address, const Strides& strides) {
  for (int64_t stride : strides)
    check(stride >= 0, name, ": expected strides >= 0, got ", stride);
  check(address != 0, name, ": expected an address, got null");
}

using Place = std::array<int64_t, 4>;  // an address (0: none), and strides of the first three dims

// of: q, k, v, pk, pv, out, dout, dq, dk, dv. sizes: b, h, hkv, t, s, p, d. Strides of the mask: of
// b, h and t.
void prefix_train(const std::array<Place, 10>& of, Address ids, Address lse, const Place& mask,
                  Address dlse, Address dpk, Address dpv, Address work, int64_t threads,
                  const std::array<int64_t, 7>& sizes, int64_t window, bool causal, double scale,
                  int dtype) {
  const auto floats = [](Address address) { return static_cast<float*>(pointer(address)); };
  std::array<cpu::Keys, 10> keys;
  for (size_t i = 0; i < of.size(); ++i)
    keys[i] = {pointer(static_cast<Address>(of[i][0])), of[i][1], of[i][2], of[i][3]};
  const auto [b, h, hkv, t, s, p, d] = sizes;
  for (int i : {0, 1, 2, 5}) check(keys[i].data, "q, k, v, out: expected addresses, got null");
  check((keys[3].data && keys[4].data) || p == 0, "pk, pv: expected addresses, got null");
  check(ids && lse && work, "ids, lse, work: expected addresses, got null");
  check(keys[6].data || !(keys[7].data || dpk), "dout: expected an address, got null");
  check(!keys[7].data == !keys[8].data && !keys[7].data == !keys[9].data && !dpk == !dpv,
        "gradients: expected those of q, k, v together, and those of the prefix");
  py::gil_scoped_release release;
  cpu::prefix_train({keys[0], keys[1], keys[2], keys[3], keys[4], keys[5],
                     static_cast<const int64_t*>(pointer(ids)),
                     floats(static_cast<Address>(mask[0])), mask[1], mask[2], mask[3], floats(lse),
                     b, h, hkv, t, s, p, d, window, causal, static_cast<float>(scale), dtype,
                     keys[6], keys[7], keys[8], keys[9], floats(dlse), floats(dpk), floats(dpv),
                     floats(work), threads});
}

void prefix_decode(Address q, Address k, Address v, Address pk, Address pv, Address slots,
                   Address prefix_length, Address lengths, Address table, Address out, Address lse,
                   int64_t b, int64_t h, int64_t hkv, int64_t t, int64_t s, int64_t d,
                   int64_t slot_count, int64_t max_prefix, const Strides& sk, const Strides& sv,
                   const Strides& spk, const Strides& spv, int64_t table_stride, int64_t block,
                   int64_t block_count, double scale, int64_t window, int dtype) {
  const auto keys = [](Address address, const Strides& s) {
    return cpu::Keys{pointer(address), s[0], s[1], s[2]};
  };
  const auto ints = [](Address address) { return static_cast<const std::int32_t*>(pointer(address)); };
  if (b > 0 && h > 0 && t > 0) {
    if (s > 0 && (!table || block_count > 0)) check_keys("k", k, sk), check_keys("v", v, sv);
    if (slot_count * max_prefix > 0)
      check_keys("prefix.k", pk, spk), check_keys("prefix.v", pv, spv);
    check(q && out && lse && slots && (prefix_length || slot_count == 0),
          "q, out, lse, slots, prefix.length: expected addresses, got null");
  }
  py::gil_scoped_release release;
  cpu::prefix_decode(pointer(q), keys(k, sk), keys(v, sv), keys(pk, spk), keys(pv, spv), ints(slots),
                     ints(prefix_length), ints(lengths), ints(table), pointer(out),
                     static_cast<float*>(pointer(lse)), b, h, hkv, t, s, d, slot_count, max_prefix,
                     table_stride, block, block_count, scale, window, dtype);
}

#if FUSEDPEFT_CUDA
void multi_lora_cuda(Address x, Address w, Address bias, Address y, Address slots, Address a,
                     Address b, Address rank, Address scale, Address s, Address sums,
                     const std::vector<int64_t>& sizes, int64_t count, int64_t max_rank, int64_t m,
                     int64_t k, int64_t n, int64_t sx, int64_t sw, int64_t a_slot, int64_t a_row,
                     int64_t b_slot, int processors, int splits, int dtype, int adapter_dtype,
                     double one_scale, Address stream) {
  const auto parts = static_cast<int64_t>(sizes.size());
  constexpr int64_t kMost = int64_t{1} << 30;  // these are 32 bits on the device
  check(parts <= cuda::kMaxParts, "sizes: expected at most ", cuda::kMaxParts, " parts, got ", parts);
  check(m <= cuda::kMostTokens, "m: expected at most ", cuda::kMostTokens, ", got ", m);
  check(k <= kMost && count <= kMost && max_rank <= kMost, "k, count, max_rank: expected <= 2^30, got ",
        k, ", ", count, ", ", max_rank);
  check_matrix("x", x, m, k, sx);
  check_matrix("w", w, n, k, sw);
  check_matrix("y", y, m, n, n);
  if (slots || rank || scale || count != 1) {  // else one adapter for all
    check_matrix("slots", slots, m, 1, 1);
    check_matrix("rank", rank, count, parts, parts);
    check_matrix("scale", scale, count, parts, parts);
  }
  check_matrix("a", a, count, parts * max_rank * k, a_slot);
  check_matrix("b", b, count, n * max_rank, b_slot);
  check(s && (sums || splits == 1), "s, sums: expected addresses, got null");
  cuda::MultiLora call = {pointer(x), pointer(w), pointer(bias), pointer(y),
                          static_cast<const int32_t*>(pointer(slots)), pointer(a), pointer(b),
                          static_cast<const int32_t*>(pointer(rank)),
                          static_cast<const float*>(pointer(scale)),
                          static_cast<float*>(pointer(s)), static_cast<float*>(pointer(sums)), {},
                          n, sx, sw, a_slot, a_row, b_slot, static_cast<int>(m), static_cast<int>(k),
                          static_cast<int>(count), static_cast<int>(parts),
                          static_cast<int>(max_rank), processors, splits, dtype,
                          adapter_dtype, static_cast<float>(one_scale)};
  std::copy(sizes.begin(), sizes.end(), call.sizes);
  py::gil_scoped_release release;
  cuda::multi_lora(call, pointer(stream));
}

void adapter_decode_cuda(Address x, Address residual, Address y, Address slots, Address size,
                         Address scale, Address down, Address down_bias, Address up, Address up_bias,
                         Address norm_weight, Address norm_bias, int64_t count, int64_t m, int64_t d,
                         int64_t sx, int64_t sr, int64_t down_slot, int64_t down_bias_slot,
                         int64_t up_slot, int64_t up_bias_slot, int64_t norm_weight_slot,
                         int64_t norm_bias_slot, double eps, int norm, int activation, int dtype,
                         int adapter_dtype, int64_t max_size, int processors, Address stream) {
  check_matrix("x", x, m, d, sx);
  check_matrix("y", y, m, d, d);
  check_matrix("slots", slots, m, 1, 1);
  check(count == 0 || (size && scale && down && up), "pool: expected addresses, got null");
  py::gil_scoped_release release;
  cuda::adapter_decode({pointer(x), pointer(residual), pointer(y),
                        static_cast<const int32_t*>(pointer(slots)),
                        static_cast<const int32_t*>(pointer(size)),
                        static_cast<const float*>(pointer(scale)), pointer(down),
                        pointer(down_bias), pointer(up), pointer(up_bias), pointer(norm_weight),
                        pointer(norm_bias), count, m, d, max_size, sx, sr, down_slot, down_bias_slot,
                        up_slot, up_bias_slot, norm_weight_slot, norm_bias_slot,
                        static_cast<float>(eps), norm, activation, dtype, adapter_dtype, processors},
                       pointer(stream));
}

void prefix_decode_cuda(Address q, Address k, Address v, Address pk, Address pv, Address slots,
                        Address prefix_length, Address lengths, Address table, Address out,
                        Address lse, int b, int h, int hkv, int t, int s, int d, int slot_count,
                        int max_prefix, const Strides& sk, const Strides& sv, const Strides& spk,
                        const Strides& spv, int64_t table_stride, int block, int block_count,
                        double scale, int window, int dtype, Address work, int prefix_splits,
                        int splits, Address stream) {
  const auto keys = [](Address address, const Strides& s) {
    return cuda::PrefixDecode::Keys{pointer(address), s[0], s[1], s[2]};
  };
  const auto ints = [](Address address) { return static_cast<const std::int32_t*>(pointer(address)); };
  const auto floats = [](Address address) { return static_cast<float*>(pointer(address)); };
  if (b > 0 && h > 0 && t > 0) {
    if (s > 0 && (!table || block_count > 0)) check_keys("k", k, sk), check_keys("v", v, sv);
    if (slot_count > 0 && max_prefix > 0)
      check_keys("prefix.k", pk, spk), check_keys("prefix.v", pv, spv);
    check(q && out && lse && slots && work && (prefix_length || slot_count == 0),
          "q, out, lse, slots, work, prefix.length: expected addresses, got null");
  }
  py::gil_scoped_release release;
  cuda::prefix_decode({pointer(q), keys(k, sk), keys(v, sv), keys(pk, spk), keys(pv, spv),
                       ints(slots), ints(prefix_length), ints(lengths), ints(table), pointer(out),
                       floats(lse), floats(work), b, h, hkv, t, s, d, slot_count, max_prefix,
                       table_stride, block, block_count, prefix_splits, splits,
                       static_cast<float>(scale), window, dtype},
                      pointer(stream));
}
#endif

py::dict build_info() {
  const auto text = [](const char* value) -> py::object {
    return value == nullptr ? py::object(py::none()) : py::object(py::str(value));
  };
  py::dict info;
  info["cuda"] = bool(FUSEDPEFT_CUDA);
  info["cuda_archs"] = text(FUSEDPEFT_CUDA_ARCHS);
  info["nvcc"] = text(FUSEDPEFT_NVCC);
  info["compiler"] = text(FUSEDPEFT_COMPILER);
  return info;
}

void bind_slot_table(py::module_& m) {
  const auto slots = [](const SlotTable& table) {
    constexpr const char* states[] = {"free", "loading", "live", "retired"};
    py::list found;
    for (const SlotTable::Slot& slot : table.slots())
      found.append(py::make_tuple(states[slot.state], slot.name, slot.holds));
    return found;
  };
  const py::call_guard<py::gil_scoped_release> unlocked;  // begin_load may wait for a Python thread
  py::class_<SlotTable>(m, "SlotTable", "Which adapter lies in which slot; see csrc/pool.h.")
      .def(py::init<int64_t>())
      .def("begin_load", &SlotTable::begin_load, unlocked, "name -> (slot, name evicted from it)")
      .def("commit", &SlotTable::commit, unlocked, "(slot, hold) -> slot to wipe and free, or -1")
      .def("free", &SlotTable::free, unlocked)
      .def("acquire", &SlotTable::acquire, unlocked, "names -> slots, each held; -1 for no slot")
      .def("release", &SlotTable::release, unlocked, "slots -> those to wipe and free")
      .def("evict", &SlotTable::evict, unlocked, "name -> slot to wipe and free, or -1")
      .def("find", &SlotTable::find, unlocked, "name -> slot, or -1")
      .def("slots", slots, "[(state, name, holds)]");
}

}  // namespace
}  // namespace fusedpeft

PYBIND11_MODULE(_C, m) {
  using namespace fusedpeft;
  m.doc() = "Kernels in C++ and CUDA; import torch first, its OpenMP pool is used.";
  m.def("build_info", &build_info, "What setup.py built: cuda, cuda_archs, nvcc, compiler.");
  m.def("cpu_capability", &cpu::cpu_capability, "The instruction set that the CPU kernels use.");
  m.def("lora_decode", &lora_decode, "y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ on a CPU, for few rows.");
  m.def("dequantise", &dequantise, "Rows and columns of W in NF4 or FP8, as numbers, on a CPU.");
  m.def("lora_decode_quantised", &lora_decode_quantised,
        "lora_decode over W in NF4 or FP8, which is read as it is.");
  m.def("adapter_decode", &adapter_decode,
        "y = residual + scale · (act(norm(x) Dᵀ + c) Uᵀ + e) on a CPU, for few rows.");
  m.def("adapter_train", &adapter_train,
        "One adapter for many rows, forward and backward: see pyext/ops/adapter_native.py.");
  m.def("adapter_decode_one", &adapter_decode_one, "As adapter_decode, one adapter for all rows.");
  m.def("multi_lora", &multi_lora,
        "y = x Wᵀ + bias on a CPU, and of each row its own slot's scale · B (A x).");
  m.def("linear", &linear, "y = x Wᵀ + bias on a CPU, for up to 64 rows.");
  m.def("rms_norm", &rms_norm, "RMSNorm of rows on a CPU, or with dy the gradient of x.");
  m.def("gated", &gated, "act(gate) · up on a CPU, or with dy the gradients of both.");
  m.def("rotary", &rotary, "Rotary positions on a CPU, or backward the gradient of x.");
  m.def("softmax", &softmax, "logsumexp of rows on a CPU, and in their place the softmax.");
  m.def("dropout", &dropout, "out = x · keep / (1 - p) on a CPU.");
  bind_slot_table(m);
  m.def("prefix_train", &prefix_train,
        "Attention of many queries over a prefix and keys on a CPU, or with dout its gradients.");
  m.def("prefix_train_floats", &cpu::prefix_train_floats, "Of `work`, for each thread.");
  m.def("prefix_decode", &prefix_decode, "Attention of a few queries over prefix and keys on a CPU.");
#if FUSEDPEFT_CUDA
  m.def("adapter_decode_cuda", &adapter_decode_cuda, "adapter_decode on a CUDA stream, in one launch.");
  m.def("prefix_decode_cuda", &prefix_decode_cuda, "prefix_decode on a CUDA stream.");
  m.def("multi_lora_cuda", &multi_lora_cuda,
        "multi_lora on a CUDA stream, for up to 64 rows; no slots, ranks, scales: one adapter for all.");
#endif
}
