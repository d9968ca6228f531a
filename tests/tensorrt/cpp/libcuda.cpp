// A CUDA driver that launches nothing and writes down, a line of JSON each, what it was told.
//
// A module is a text, `name:kinds`: a letter for each parameter, as targets/tensorrt/cpp has them.
// FAKE_CUDA_FAILS names a function that answers an error.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../../targets/tensorrt/cpp/driver.hpp"

namespace cu = lingc::cu;

static bool fails(char const* name) {
  char const* wanted = std::getenv("FAKE_CUDA_FAILS");
  return wanted && std::strcmp(wanted, name) == 0;
}

#define ANSWER(name) return fails(name) ? 700 : 0

extern "C" {

cu::Result cuCtxGetCurrent(void** context) {
  *context = fails("cuCtxGetCurrent") ? nullptr : reinterpret_cast<void*>(1);
  return 0;
}

cu::Result cuCtxGetId(void*, unsigned long long* id) {
  *id = 7;
  ANSWER("cuCtxGetId");
}

cu::Result cuModuleLoadData(void** module, void const* image) {
  *module = const_cast<void*>(image);
  std::printf("{\"load\":\"%s\"}\n", static_cast<char const*>(image));
  ANSWER("cuModuleLoadData");
}

cu::Result cuModuleGetFunction(void** function, void* module, char const*) {
  *function = module;
  ANSWER("cuModuleGetFunction");
}

cu::Result cuFuncSetAttribute(void*, int attribute, int value) {
  std::printf("{\"attribute\":%d,\"value\":%d}\n", attribute, value);
  ANSWER("cuFuncSetAttribute");
}

cu::Result cuMemcpyDtoDAsync_v2(cu::DevicePtr to, cu::DevicePtr from, std::size_t size, void* on) {
  std::printf("{\"copy\":[%llu,%llu,%zu],\"stream\":%zu}\n", to, from, size,
              reinterpret_cast<std::size_t>(on));
  ANSWER("cuMemcpyDtoDAsync");
}

cu::Result cuMemsetD8Async(cu::DevicePtr at, unsigned char value, std::size_t size, void* on) {
  std::printf("{\"clear\":[%llu,%zu,%d],\"stream\":%zu}\n", at, size, value,
              reinterpret_cast<std::size_t>(on));
  ANSWER("cuMemsetD8Async");
}

cu::Result cuLaunchKernelEx(cu::LaunchConfig const* config, void* function, void** values, void**) {
  char const* text = static_cast<char const*>(function);
  char const* kinds = std::strchr(text, ':') + 1;
  std::printf("{\"launch\":\"%.*s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%u,",
              static_cast<int>(kinds - 1 - text), text, config->grid_x, config->grid_y,
              config->grid_z, config->block_x, config->block_y, config->block_z,
              config->shared_bytes);
  unsigned cluster[3] = {1, 1, 1};
  int dependent = 0;
  for (unsigned i = 0; i < config->count; ++i) {
    auto const& one = config->attributes[i];
    if (one.id == cu::kClusterDimension) std::memcpy(cluster, one.value.pad, sizeof cluster);
    if (one.id == cu::kProgrammaticSerialization) dependent = one.value.serialization;
  }
  std::printf("\"cluster\":[%u,%u,%u],\"dependent\":%d,\"stream\":%zu,\"values\":[", cluster[0],
              cluster[1], cluster[2], dependent, reinterpret_cast<std::size_t>(config->stream));
  for (std::size_t i = 0; kinds[i]; ++i) {
    unsigned long long value = 0;
    std::memcpy(&value, values[i], kinds[i] == 'i' || kinds[i] == 'f' ? 4 : 8);
    std::printf("%s%llu", i ? "," : "", value);
  }
  std::printf("]}\n");
  ANSWER("cuLaunchKernelEx");
}

cu::Result cuGetErrorName(cu::Result, char const** name) {
  *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
  return 0;
}

}  // extern "C"
