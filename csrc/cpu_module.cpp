// less_fast._cpu: the CPU operations as plain functions of addresses and sizes. Python validates; see ops/cpu.py.
#include <pybind11/pybind11.h>

#include "cpu_ops.h"
#include "cpu_score.h"
#include "philox.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

lf::Precondition make_rule(int rule, uintptr_t a, uintptr_t b, float alpha, float gamma, float e) {
  return {static_cast<lf::Rule>(rule), pointer<const float>(a), pointer<const float>(b), alpha, gamma, e};
}

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU operations of less_fast on raw addresses; use less_fast.ops instead.";

  py::class_<lf::Precondition>(m, "Precondition")
      .def(py::init(&make_rule), py::arg("rule"), py::arg("a"), py::arg("b"), py::arg("alpha"), py::arg("gamma"),
           py::arg("e"));
  py::class_<lf::Gradients>(m, "Gradients")
      .def(py::init([](Address data, int64_t n, int64_t stride_n, int64_t n_short, int64_t n_long) {
             return lf::Gradients{pointer<const float>(data), n, stride_n, n_short, n_long};
           }),
           py::arg("data"), py::arg("n"), py::arg("stride_n"), py::arg("n_short"), py::arg("n_long"));
  py::class_<lf::Features>(m, "Features")
      .def(py::init([](Address data, int64_t dim, int64_t stride) {
             return lf::Features{pointer<float>(data), dim, stride};
           }),
           py::arg("data"), py::arg("dim"), py::arg("stride"));

  m.def("accumulate_srht", &lf::accumulate_srht, py::arg("features"), py::arg("grads"), py::arg("rule"),
        py::arg("rho_base"), py::arg("block"), py::arg("seed"), py::arg("threads"), Release());
  m.def("accumulate_sjlt", &lf::accumulate_sjlt, py::arg("features"), py::arg("grads"), py::arg("rule"),
        py::arg("j_base"), py::arg("short_stride"), py::arg("long_stride"), py::arg("nnz"), py::arg("seed"),
        py::arg("threads"), Release());
  m.def(
      "accumulate_dense",
      [](const lf::Features& features, const lf::Gradients& grads, const lf::Precondition& rule, int kind,
         int64_t j_base, int64_t short_stride, int64_t long_stride, uint64_t seed, float scale, int threads) {
        lf::accumulate_dense(features, grads, rule, static_cast<lf::Dense>(kind), j_base, short_stride, long_stride,
                             seed, scale, threads);
      },
      py::arg("features"), py::arg("grads"), py::arg("rule"), py::arg("kind"), py::arg("j_base"),
      py::arg("short_stride"), py::arg("long_stride"), py::arg("seed"), py::arg("scale"), py::arg("threads"),
      Release());
  m.def(
      "precondition",
      [](Address out, const lf::Gradients& grads, const lf::Precondition& rule, int threads) {
        lf::precondition(pointer<float>(out), grads, rule, threads);
      },
      py::arg("out"), py::arg("grads"), py::arg("rule"), py::arg("threads"), Release());
  m.def(
      "philox",
      [](uint64_t seed, uint64_t index, uint32_t block, uint32_t tag) {
        const lf::Words drawn = lf::philox(seed, index, block, tag);
        return py::make_tuple(drawn.w[0], drawn.w[1], drawn.w[2], drawn.w[3]);
      },
      py::arg("seed"), py::arg("index"), py::arg("block"), py::arg("tag"));
  m.def("use_avx2", &lf::use_avx2, py::arg("wanted"));

  m.def(
      "inner_products",
      [](Address out, int64_t out_stride, Address codes, int64_t row_bytes, int dtype_code, int64_t n, int64_t dim,
         Address queries, int64_t n_queries, Address factor, bool accumulate, int threads) {
        lf::inner_products({pointer<float>(out), out_stride, pointer<const float>(factor), accumulate},
                           {pointer<const uint8_t>(codes), row_bytes, n, dim}, static_cast<lf::CodeType>(dtype_code),
                           pointer<const float>(queries), n_queries, threads);
      },
      py::arg("out"), py::arg("out_stride"), py::arg("codes"), py::arg("row_bytes"), py::arg("dtype_code"),
      py::arg("n"), py::arg("dim"), py::arg("queries"), py::arg("n_queries"), py::arg("factor"), py::arg("accumulate"),
      py::arg("threads"), Release());
  m.def(
      "inner_products_bits",
      [](Address out, int64_t out_stride, Address codes, int64_t row_bytes, int64_t n, int64_t dim, Address query_codes,
         int64_t n_queries, Address factor, Address query_factor, bool accumulate, int threads) {
        lf::inner_products_bits({pointer<float>(out), out_stride, pointer<const float>(factor), accumulate},
                                {pointer<const uint8_t>(codes), row_bytes, n, dim},
                                pointer<const uint8_t>(query_codes), n_queries, pointer<const float>(query_factor),
                                threads);
      },
      py::arg("out"), py::arg("out_stride"), py::arg("codes"), py::arg("row_bytes"), py::arg("n"), py::arg("dim"),
      py::arg("query_codes"), py::arg("n_queries"), py::arg("factor"), py::arg("query_factor"), py::arg("accumulate"),
      py::arg("threads"), Release());
  m.def("use_instructions", &lf::use_instructions, py::arg("wanted"));
}
