// The plugins of lingc's TensorRT engines without Python: one class for every op, which launches
// what its plugin table says. For standard TensorRT 10.16 and 11.x, and TensorRT for RTX 1.7.
//
// `lingc deploy --include` compiles it, and docs/tensorrt.md has the command. TensorRT's registry
// loads the library (`IPluginRegistry::loadLibrary`). Tables and kernels are looked for in the folders
// of the environment variable LINGC_PLUGINS, by colons, or else in `plugins` beside the library. An
// engine says by what digests; whether Python's plugins or these were there when it was built does
// not matter.

#include <NvInfer.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.hpp"
#include "step.hpp"
#include "table.hpp"

#if __has_include(<cuda.h>)
#include <cuda.h>
static_assert(sizeof(CUlaunchConfig) == sizeof(lingc::cu::LaunchConfig));
static_assert(offsetof(CUlaunchConfig, sharedMemBytes) ==
              offsetof(lingc::cu::LaunchConfig, shared_bytes));
static_assert(offsetof(CUlaunchConfig, hStream) == offsetof(lingc::cu::LaunchConfig, stream));
static_assert(offsetof(CUlaunchConfig, attrs) == offsetof(lingc::cu::LaunchConfig, attributes));
static_assert(offsetof(CUlaunchConfig, numAttrs) == offsetof(lingc::cu::LaunchConfig, count));
static_assert(sizeof(CUlaunchAttribute) == sizeof(lingc::cu::Attribute));
static_assert(offsetof(CUlaunchAttribute, value) == offsetof(lingc::cu::Attribute, value));
static_assert(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION == lingc::cu::kClusterDimension);
static_assert(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION ==
              lingc::cu::kProgrammaticSerialization);
static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == lingc::cu::kMaxDynamicShared);
static_assert(sizeof(CUdeviceptr) == sizeof(lingc::cu::DevicePtr));
#endif

namespace lingc {
namespace {

namespace trt = nvinfer1;

constexpr char kNamespace[] = "lingc";
constexpr char kVersion[] = "1";
constexpr char kOp[] = "op", kTable[] = "table", kCall[] = "call";  // what a plugin serializes

trt::ILoggerFinder* finder = nullptr;

void tell(std::string const& message) noexcept {
  trt::ILogger* const logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(trt::ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

// Do something; where it fails, say what of, and answer otherwise.
template <typename Answer, typename Work>
Answer guarded(std::string const& what, Answer otherwise, Work const& work) noexcept {
  try {
    return work();
  } catch (std::exception const& error) {
    tell("lingc: " + what + ": " + error.what());
  }
  return otherwise;
}

std::vector<std::string> folders() {
  std::vector<std::string> made;
  if (char const* given = std::getenv("LINGC_PLUGINS"); given && *given) {
    std::string_view rest(given);
    while (!rest.empty()) {
      auto const end = std::min(rest.find(':'), rest.size());
      if (end) made.emplace_back(rest.substr(0, end));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
    return made;
  }
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&folders), &info) && info.dli_fname) {
    std::string const path = info.dli_fname;
    auto const end = path.rfind('/');
    made.push_back((end == std::string::npos ? "." : path.substr(0, end)) + "/plugins");
  }
  return made;
}

Bundle& bundle() {
  static Bundle made(folders());
  return made;
}

trt::DataType type_of(std::string const& dtype) {
  static std::map<std::string, trt::DataType> const kTypes{
      {"f32", trt::DataType::kFLOAT}, {"bf16", trt::DataType::kBF16},
      {"f8e4m3", trt::DataType::kFP8}, {"i32", trt::DataType::kINT32},
      {"i64", trt::DataType::kINT64},  {"u8", trt::DataType::kUINT8}};
  return kTypes.at(dtype);  // the table was checked
}

// `LingMlaLatent` of `mla_latent`.
std::string plugin_name(std::string const& op) {
  std::string made = "Ling";
  bool upper = true;
  for (char const letter : op) {
    if (letter != '_') made += static_cast<char>(upper ? std::toupper(letter) : letter);
    upper = letter == '_';
  }
  return made;
}

// ----------------------------------------------------------------------------------------- a plugin

class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public trt::IPluginV3OneBuildV2,
                     public trt::IPluginV3OneRuntime {
 public:
  Plugin(std::string layer, std::string digest, std::shared_ptr<Table const> table,
         std::size_t number, trt::TensorRTPhase phase)
      : layer_(std::move(layer)),
        digest_(std::move(digest)),
        table_(std::move(table)),
        number_(static_cast<std::int32_t>(number)),
        phase_(phase),
        call_(&table_->calls.at(number)),
        name_(plugin_name(call_->op)),
        what_("plugin \"" + layer_ + "\" (" + call_->op + ")") {}

  Plugin(Plugin const& other)
      : Plugin(other.layer_, other.digest_, other.table_,
               static_cast<std::size_t>(other.number_), other.phase_) {}

  trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override {
    switch (type) {
      case trt::PluginCapabilityType::kCORE: return static_cast<trt::IPluginV3OneCore*>(this);
      case trt::PluginCapabilityType::kBUILD: return static_cast<trt::IPluginV3OneBuildV2*>(this);
      case trt::PluginCapabilityType::kRUNTIME:
        return static_cast<trt::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  trt::IPluginV3* clone() noexcept override {
    return guarded<trt::IPluginV3*>(what_, nullptr, [&] { return new Plugin(*this); });
  }

  char const* getPluginName() const noexcept override { return name_.c_str(); }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  // ---------------------------------------------------------------------------------- while building

  std::int32_t configurePlugin(trt::DynamicPluginTensorDesc const*, std::int32_t,
                               trt::DynamicPluginTensorDesc const*, std::int32_t) noexcept override {
    return 0;
  }

  std::int32_t getNbOutputs() const noexcept override {
    return static_cast<std::int32_t>(call_->outputs.size());
  }

  std::int32_t getOutputDataTypes(trt::DataType* types, std::int32_t count, trt::DataType const*,
                                  std::int32_t) const noexcept override {
    return guarded(what_, 1, [&] {
      for (std::int32_t i = 0; i < count; ++i) types[i] = type_of(call_->outputs.at(i).dtype);
      return 0;
    });
  }

  std::int32_t getOutputShapes(trt::DimsExprs const* inputs, std::int32_t count,
                               trt::DimsExprs const*, std::int32_t, trt::DimsExprs* outputs,
                               std::int32_t made, trt::IExprBuilder& builder) noexcept override {
    return guarded(what_, 1, [&] {
      if (static_cast<std::size_t>(count) != call_->inputs.size()) {
        throw Error("it takes " + std::to_string(call_->inputs.size()) + " inputs and has " +
                    std::to_string(count));
      }
      for (std::int32_t i = 0; i < made; ++i) {
        auto const& shape = call_->outputs.at(i).shape;
        outputs[i].nbDims = static_cast<std::int32_t>(shape.size());
        for (std::size_t k = 0; k < shape.size(); ++k) {
          outputs[i].d[k] = expression(shape[k], inputs, builder);
        }
      }
      return 0;
    });
  }

  bool supportsFormatCombination(std::int32_t position, trt::DynamicPluginTensorDesc const* given,
                                 std::int32_t inputs, std::int32_t) noexcept override {
    return guarded(what_, false, [&] {
      auto const& dtype = position < inputs ? call_->inputs.at(position).dtype
                                            : call_->outputs.at(position - inputs).dtype;
      auto const& desc = given[position].desc;
      return desc.format == trt::TensorFormat::kLINEAR && desc.type == type_of(dtype);
    });
  }

  std::size_t getWorkspaceSize(trt::DynamicPluginTensorDesc const*, std::int32_t,
                               trt::DynamicPluginTensorDesc const*,
                               std::int32_t) const noexcept override {
    return static_cast<std::size_t>(table_->workspace_bytes(*call_));
  }

  // Without one TensorRT times it in every build, which a build that is held to a cache may not.
  char const* getTimingCacheID() noexcept override {
    return guarded<char const*>(what_, nullptr, [&] {
      if (timing_.empty()) timing_ = table_->timing_id(*call_);
      return timing_.c_str();
    });
  }

  std::int32_t getNbTactics() noexcept override { return 1; }

  std::int32_t getValidTactics(std::int32_t* tactics, std::int32_t count) noexcept override {
    for (std::int32_t i = 0; i < count; ++i) tactics[i] = 1;
    return 0;
  }

  // ----------------------------------------------------------------------------------- while it runs

  std::int32_t setTactic(std::int32_t) noexcept override { return 0; }

  // Loads the kernels for these sizes, so that `enqueue` neither loads nor allocates.
  std::int32_t onShapeChange(trt::PluginTensorDesc const* inputs, std::int32_t count,
                             trt::PluginTensorDesc const*, std::int32_t) noexcept override {
    if (phase_ == trt::TensorRTPhase::kBUILD) return 0;  // sizes in between buckets, too
    return guarded(what_, 1, [&] {
      (void)ready(inputs, static_cast<std::size_t>(count));
      return 0;
    });
  }

  std::int32_t enqueue(trt::PluginTensorDesc const* input_descs, trt::PluginTensorDesc const*,
                       void const* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override {
    // A builder that times layers runs this one too; there is one way to run it, so nothing is won.
    if (phase_ == trt::TensorRTPhase::kBUILD) return 0;
    return guarded(what_, 1, [&] {
      ready(input_descs, call_->inputs.size()).run(inputs, outputs, workspace, stream);
      return 0;
    });
  }

  trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override {
    return clone();
  }

  trt::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    auto const length = [](std::string const& text) {
      return static_cast<std::int32_t>(text.size());
    };
    fields_ = {{kOp, call_->op.data(), trt::PluginFieldType::kCHAR, length(call_->op)},
               {kTable, digest_.data(), trt::PluginFieldType::kCHAR, length(digest_)},
               {kCall, &number_, trt::PluginFieldType::kINT32, 1}};
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  static trt::IDimensionExpr const* expression(Dim const& dim, trt::DimsExprs const* inputs,
                                               trt::IExprBuilder& builder) {
    auto const* axis = std::get_if<Axis>(&dim);
    if (!axis) return builder.constant(std::get<std::int64_t>(dim));
    auto const& given = inputs[axis->input];
    if (given.nbDims <= static_cast<std::int32_t>(axis->axis)) {
      throw Error("its input " + std::to_string(axis->input) + " has " +
                  std::to_string(given.nbDims) + " axes");
    }
    auto const* size = given.d[axis->axis];
    if (axis->times == 1) return size;
    auto const* times = builder.constant(axis->times);
    return builder.operation(trt::DimensionOperation::kPROD, *size, *times);
  }

  bool is_same(trt::PluginTensorDesc const* inputs) const {
    if (shapes_.size() != call_->inputs.size()) return false;
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      auto const& dims = inputs[i].dims;
      if (static_cast<std::size_t>(dims.nbDims) != shapes_[i].size()) return false;
      for (std::int32_t k = 0; k < dims.nbDims; ++k) {
        if (dims.d[k] != shapes_[i][k]) return false;
      }
    }
    return true;
  }

  Step const& ready(trt::PluginTensorDesc const* inputs, std::size_t count) {
    if (step_ && is_same(inputs)) return *step_;
    step_.reset();
    shapes_.clear();
    for (std::size_t i = 0; i < count; ++i) {
      auto const& dims = inputs[i].dims;
      shapes_.emplace_back(dims.d, dims.d + std::max(dims.nbDims, 0));
    }
    step_ = std::make_unique<Step>(bundle(), *table_, *call_, shapes_);
    return *step_;
  }

  std::string layer_, digest_;
  std::shared_ptr<Table const> table_;
  std::int32_t number_;
  trt::TensorRTPhase phase_;
  Call const* call_;
  std::string name_, what_, timing_;
  std::vector<trt::PluginField> fields_;
  trt::PluginFieldCollection collection_{};
  std::vector<Shape> shapes_;
  std::unique_ptr<Step> step_;
};

// --------------------------------------------------------------------------------------- its creator

class Creator final : public trt::IPluginCreatorV3One {
 public:
  explicit Creator(std::string op) : op_(std::move(op)), name_(plugin_name(op_)) {}

  trt::IPluginV3* createPlugin(char const* name, trt::PluginFieldCollection const* given,
                               trt::TensorRTPhase phase) noexcept override {
    std::string const layer = name ? name : "";
    auto const what = "plugin \"" + layer + "\" (" + op_ + ")";
    return guarded<trt::IPluginV3*>(what, nullptr, [&]() -> trt::IPluginV3* {
      std::string const digest = text(field(given, kTable));
      auto const& call = field(given, kCall);
      if (call.type != trt::PluginFieldType::kINT32 || call.length != 1) {
        throw Error("its field \"call\" is not a whole number");
      }
      std::int32_t const number = *static_cast<std::int32_t const*>(call.data);
      auto table = bundle().table(digest);
      if (number < 0 || static_cast<std::size_t>(number) >= table->calls.size()) {
        throw Error("plugin table " + digest + " has no call " + std::to_string(number));
      }
      if (table->calls[number].op != op_) {
        throw Error("call " + std::to_string(number) + " of plugin table " + digest + " is of " +
                    table->calls[number].op);
      }
      return new Plugin(layer, digest, std::move(table), static_cast<std::size_t>(number), phase);
    });
  }

  trt::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return name_.c_str(); }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  static trt::PluginField const& field(trt::PluginFieldCollection const* given, char const* name) {
    for (std::int32_t i = 0; given && i < given->nbFields; ++i) {
      if (std::strcmp(given->fields[i].name, name) == 0) return given->fields[i];
    }
    throw Error(std::string("its field \"") + name + "\" is missing");
  }

  // Parsers differ in whether a zero ends it.
  static std::string text(trt::PluginField const& given) {
    if (given.type != trt::PluginFieldType::kCHAR) {
      throw Error(std::string("its field \"") + given.name + "\" is not a text");
    }
    std::string made(static_cast<char const*>(given.data), static_cast<std::size_t>(given.length));
    made.erase(made.find_last_not_of('\0') + 1);
    return made;
  }

  std::string op_, name_;
  trt::PluginField fields_[3] = {{kOp, nullptr, trt::PluginFieldType::kCHAR, 0},
                                 {kTable, nullptr, trt::PluginFieldType::kCHAR, 0},
                                 {kCall, nullptr, trt::PluginFieldType::kINT32, 1}};
  trt::PluginFieldCollection collection_{3, fields_};
};

// One for each op of the tables that lie in the folders; a table that is broken is told and left.
std::vector<trt::IPluginCreatorInterface*> const& creators() {
  static std::vector<trt::IPluginCreatorInterface*> const made = [] {
    std::set<std::string> ops;
    for (std::string const& digest : bundle().digests()) {
      guarded("LINGC_PLUGINS", 0, [&] {
        for (Call const& call : bundle().table(digest)->calls) ops.insert(call.op);
        return 0;
      });
    }
    if (ops.empty()) {
      tell("lingc: there is no plugin table in \"" + bundle().where() +
           "\"; LINGC_PLUGINS names the folder that `lingc deploy` wrote");
    }
    std::vector<trt::IPluginCreatorInterface*> found;
    for (std::string const& op : ops) found.push_back(new Creator(op));  // as long as the process
    return found;
  }();
  return made;
}

}  // namespace
}  // namespace lingc

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(
    nvinfer1::ILoggerFinder* finder) {
  lingc::finder = finder;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(std::int32_t& count) {
  auto const& made = lingc::creators();
  count = static_cast<std::int32_t>(made.size());
  return made.data();
}
