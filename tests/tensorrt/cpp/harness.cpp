// Drives the compiled plugins as TensorRT does, without TensorRT: creates a plugin from fields, clones
// it into a context, says its shapes, and has it put a step on a stream.
//
//   harness LIBRARY < calls        as evaluate.cpp has them, and `op`, `phase`, `field`

#include <NvInfer.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "../../../targets/tensorrt/cpp/json.hpp"

namespace trt = nvinfer1;
using lingc::Json;

struct Log : trt::ILogger {
  std::string last;
  void log(Severity, char const* message) noexcept override { last = message; }
};

struct Finder : trt::ILoggerFinder {
  Log held;
  trt::ILogger* findLogger() override { return &held; }
};

static std::vector<void*> addresses(Json const& value) {
  std::vector<void*> made;
  for (auto const& one : value.array()) {
    made.push_back(reinterpret_cast<void*>(static_cast<std::uintptr_t>(one.integer())));
  }
  return made;
}

static std::vector<trt::PluginTensorDesc> descs(Json const& shapes) {
  std::vector<trt::PluginTensorDesc> made;
  for (auto const& shape : shapes.array()) {
    trt::PluginTensorDesc one{};
    for (auto const& size : shape.array()) one.dims.d[one.dims.nbDims++] = size.integer();
    made.push_back(one);
  }
  return made;
}

static std::string run(trt::IPluginCreatorInterface* const* creators, std::int32_t count,
                       Json const& value) {
  trt::IPluginCreatorV3One* creator = nullptr;
  for (std::int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<trt::IPluginCreatorV3One*>(creators[i]);
    if (one->getPluginName() == value["op"].text()) creator = one;
  }
  if (!creator) return "no creator";
  std::string const table = value["table"].text() + std::string(1, '\0');  // as parsers end it
  auto const number = static_cast<std::int32_t>(value["call"].integer());
  std::vector<trt::PluginField> fields{
      {"op", "op", trt::PluginFieldType::kCHAR, 2},
      {"table", table.data(), trt::PluginFieldType::kCHAR, static_cast<std::int32_t>(table.size())},
      {value["field"].text().c_str(), &number, trt::PluginFieldType::kINT32, 1}};
  trt::PluginFieldCollection const given{3, fields.data()};
  auto const phase = static_cast<trt::TensorRTPhase>(value["phase"].integer());
  trt::IPluginV3* const made = creator->createPlugin("layer", &given, phase);
  if (!made) return "no plugin";
  // What it serializes makes its like.
  auto* runtime = static_cast<trt::IPluginV3OneRuntime*>(
      made->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
  trt::IPluginV3* const again =
      creator->createPlugin("layer", runtime->getFieldsToSerialize(), phase);
  trt::IPluginV3* const attached =
      static_cast<trt::IPluginV3OneRuntime*>(
          again->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME))
          ->attachToContext(nullptr);
  auto* build = static_cast<trt::IPluginV3OneBuildV2*>(
      attached->getCapabilityInterface(trt::PluginCapabilityType::kBUILD));
  runtime = static_cast<trt::IPluginV3OneRuntime*>(
      attached->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
  std::printf("{\"workspace\":%zu,\"timing\":\"%s\"}\n",
              build->getWorkspaceSize(nullptr, 0, nullptr, 0), build->getTimingCacheID());
  auto const inputs = descs(value["shapes"]);
  auto const places = addresses(value["places"]);
  std::string told;
  if (runtime->onShapeChange(inputs.data(), static_cast<std::int32_t>(inputs.size()), nullptr, 0) ||
      runtime->enqueue(inputs.data(), nullptr, addresses(value["inputs"]).data(),
                       addresses(value["outputs"]).data(), places.at(0),
                       static_cast<cudaStream_t>(places.at(1)))) {
    told = "failed";
  }
  delete made;
  delete again;
  delete attached;
  return told;
}

int main(int, char** given) {
  void* const library = dlopen(given[1], RTLD_NOW);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  Finder finder;
  reinterpret_cast<void (*)(trt::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
  std::int32_t count = 0;
  auto* const creators = reinterpret_cast<trt::IPluginCreatorInterface* const* (*)(std::int32_t&)>(
      dlsym(library, "getCreators"))(count);
  for (std::string line; std::getline(std::cin, line);) {
    std::string told = run(creators, count, Json::parse(line));
    if (told.empty()) {
      std::printf("{\"end\":true}\n");
    } else {
      for (auto& letter : finder.held.last) letter = letter == '"' ? '\'' : letter;
      std::printf("{\"error\":\"%s: %s\"}\n", told.c_str(), finder.held.last.c_str());
    }
    std::fflush(stdout);
  }
}
