// The few functions of the CUDA driver that launch a kernel, found when they are first needed, so
// that the library loads and engines are built where no driver is.
//
// Types are those of cuda.h, said again here, so that this needs no CUDA headers; where they are at
// hand, plugin.cpp holds these to them.

#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "bundle.hpp"
#include "json.hpp"

namespace lingc {

namespace cu {

using Result = int;
using DevicePtr = unsigned long long;

union AttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } cluster;
  int serialization;
};

struct Attribute {
  int id;
  char pad[8 - sizeof(int)];
  AttributeValue value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned count;
};

constexpr int kClusterDimension = 4;           // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr int kProgrammaticSerialization = 6;  // ..._PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kMaxDynamicShared = 8;           // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

}  // namespace cu

class Driver {
 public:
  // Throws where there is no driver.
  static Driver& get() {
    static Driver made;
    return made;
  }

  // The loaded function of a kernel on the current device. It is loaded once, and stays: graphs
  // that were recorded may launch it when whoever asked is gone.
  void* function(Kernel const& kernel) {
    void* context = nullptr;
    unsigned long long device = 0;
    check(get_current_(&context), "cuCtxGetCurrent");
    if (!context) throw Error("no CUDA device is current in this thread");
    check(get_id_(context, &device), "cuCtxGetId");
    std::lock_guard const lock(mutex_);
    auto& held = functions_[{device, &kernel}];
    if (!held) {
      void *module = nullptr, *found = nullptr;
      check(load_(&module, kernel.code.data()), "cuModuleLoadData", kernel.entry);
      check(get_function_(&found, module, kernel.entry.c_str()), "cuModuleGetFunction",
            kernel.entry);
      if (kernel.shared_bytes > 48 * 1024) {
        check(set_attribute_(found, cu::kMaxDynamicShared, static_cast<int>(kernel.shared_bytes)),
              "cuFuncSetAttribute", kernel.entry);
      }
      held = found;
    }
    return held;
  }

  void copy(cu::DevicePtr to, cu::DevicePtr from, std::size_t size, void* stream) {
    check(copy_(to, from, size, stream), "cuMemcpyDtoDAsync");
  }

  void clear(cu::DevicePtr at, std::size_t size, void* stream) {
    if (size) check(clear_(at, 0, size, stream), "cuMemsetD8Async");
  }

  void launch(cu::LaunchConfig const& config, void* function, void** values,
              std::string const& entry) {
    check(launch_(&config, function, values, nullptr), "cuLaunchKernelEx", entry);
  }

 private:
  Driver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
    if (!library_) throw Error("no NVIDIA driver: libcuda.so.1 cannot be loaded");
    find(get_current_, "cuCtxGetCurrent");
    find(get_id_, "cuCtxGetId");
    find(load_, "cuModuleLoadData");
    find(get_function_, "cuModuleGetFunction");
    find(set_attribute_, "cuFuncSetAttribute");
    find(copy_, "cuMemcpyDtoDAsync_v2");
    find(clear_, "cuMemsetD8Async");
    find(launch_, "cuLaunchKernelEx");
    find(name_, "cuGetErrorName");
  }

  template <typename Function>
  void find(Function& function, char const* name) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (!function) throw Error(std::string("the NVIDIA driver has no ") + name + ": it is too old");
  }

  void check(cu::Result result, char const* what, std::string const& of = "") const {
    if (result == 0) return;
    char const* name = nullptr;
    name_(result, &name);
    throw Error(std::string(what) + (of.empty() ? "" : " of " + of) + " answered " +
                (name ? name : std::to_string(result).c_str()));
  }

  void* library_;
  cu::Result (*get_current_)(void**);
  cu::Result (*get_id_)(void*, unsigned long long*);
  cu::Result (*load_)(void**, void const*);
  cu::Result (*get_function_)(void**, void*, char const*);
  cu::Result (*set_attribute_)(void*, int, int);
  cu::Result (*copy_)(cu::DevicePtr, cu::DevicePtr, std::size_t, void*);
  cu::Result (*clear_)(cu::DevicePtr, unsigned char, std::size_t, void*);
  cu::Result (*launch_)(cu::LaunchConfig const*, void*, void**, void**);
  cu::Result (*name_)(cu::Result, char const**);
  std::mutex mutex_;
  std::map<std::pair<unsigned long long, Kernel const*>, void*> functions_;
};

}  // namespace lingc
