// less_fast._cuda: the CUDA operations as plain functions of addresses and sizes. Python validates; see ops/cuda.py.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda_ops.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // forget it, or the next call of anyone in this process reports it
  std::string text = std::string(what) + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")";
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    text += "; this machine has no NVIDIA driver";
  else if (driver / 1000 < CUDART_VERSION / 1000)
    text += "; the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) +
            ", less_fast._cuda was built with CUDA " + std::to_string(CUDART_VERSION / 1000);
  throw std::runtime_error(text);
}

// Makes `device` the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Place {
  Address workspace;
  int device;
  Address stream;
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA operations of less_fast on raw addresses; use less_fast.ops instead.";
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.attr("MIN_BLOCK") = lf::kMinBlock;
  m.attr("MAX_BLOCK") = lf::kMaxBlock;
  m.attr("FLOAT32") = static_cast<int>(lf::Dtype::kFloat32);
  m.attr("FLOAT16") = static_cast<int>(lf::Dtype::kFloat16);
  m.attr("BFLOAT16") = static_cast<int>(lf::Dtype::kBFloat16);

  py::class_<lf::FlatGradients>(m, "Gradients")
      .def(py::init([](Address data, int dtype, int64_t n, int64_t size, int64_t stride) {
             const auto type = static_cast<lf::Dtype>(dtype);
             return lf::FlatGradients{reinterpret_cast<const void*>(data), type, n, size, stride};
           }),
           py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("size"), py::arg("stride"));
  py::class_<lf::FlatFeatures>(m, "Features")
      .def(py::init([](Address data, int64_t dim, int64_t stride) {
             return lf::FlatFeatures{reinterpret_cast<float*>(data), dim, stride};
           }),
           py::arg("data"), py::arg("dim"), py::arg("stride"));
  py::class_<Place>(m, "Place")
      .def(py::init([](Address workspace, int device, Address stream) { return Place{workspace, device, stream}; }),
           py::arg("workspace"), py::arg("device"), py::arg("stream"));

  m.def("srht_workspace", &lf::srht_workspace, py::arg("n"), py::arg("size"), py::arg("dim"), py::arg("block"));
  m.def("sjlt_workspace", &lf::sjlt_workspace, py::arg("n"), py::arg("size"), py::arg("dim"));
  m.def(
      "sjlt_chunk_entries", [](int64_t size) { return lf::sjlt_plan(size).chunk_entries; }, py::arg("size"));
  m.def(
      "srht",
      [](const lf::FlatFeatures& features, const lf::FlatGradients& grads, int64_t run_base, int block, uint64_t seed,
         const Place& place) {
        const OnDevice guard(place.device);
        check(lf::srht(features, grads, run_base, block, seed, reinterpret_cast<void*>(place.workspace),
                       reinterpret_cast<cudaStream_t>(place.stream)),
              "srht");
      },
      py::arg("features"), py::arg("grads"), py::arg("run_base"), py::arg("block"), py::arg("seed"), py::arg("place"),
      Release());
  m.def(
      "sjlt",
      [](const lf::FlatFeatures& features, const lf::FlatGradients& grads, int64_t j_base, int nnz, uint64_t seed,
         const Place& place) {
        const OnDevice guard(place.device);
        check(lf::sjlt(features, grads, j_base, nnz, seed, reinterpret_cast<void*>(place.workspace),
                       reinterpret_cast<cudaStream_t>(place.stream)),
              "sjlt");
      },
      py::arg("features"), py::arg("grads"), py::arg("j_base"), py::arg("nnz"), py::arg("seed"), py::arg("place"),
      Release());
  m.def(
      "check_device",
      [](int device) {
        int count = 0;
        check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
        const OnDevice guard(device);
        check(lf::check_device(), "this build has no code for the device");
      },
      py::arg("device"), Release(),
      "Raises RuntimeError, with the reason, where the kernels cannot run on the device.");
  m.def(
      "sjlt_max_dim",
      [](int device) {
        const OnDevice guard(device);
        int64_t dim = 0;
        check(lf::sjlt_max_dim(&dim), "cudaDeviceGetAttribute");
        return dim;
      },
      py::arg("device"), Release());
}
