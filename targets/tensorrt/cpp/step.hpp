// One run of a plugin, made ready for shapes, so that putting it on a stream allocates nothing.

#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "driver.hpp"
#include "table.hpp"

namespace lingc {

class Step {
 public:
  // Finds and loads the kernels of a call for inputs of these shapes, on the current device.
  Step(Bundle& bundle, Table const& table, Call const& call, std::vector<Shape> const& shapes)
      : planned_(table.plan(call, shapes)) {
    for (PlannedLaunch const& one : planned_.launches) {
      Kernel const& kernel = bundle.kernel(table, one.kernel);
      check(kernel, one);
      kernels_.push_back(&kernel);
      functions_.push_back(Driver::get().function(kernel));
    }
  }

  // Put it on a stream. A result that is updated in place is copied first, unless it lies where
  // its input does.
  void run(void const* const* inputs, void* const* outputs, void* workspace, void* stream) const {
    Driver& driver = Driver::get();
    auto const base = reinterpret_cast<std::uintptr_t>(workspace);
    for (Planned::Copy const& one : planned_.copies) {
      if (outputs[one.output] == inputs[one.input]) continue;
      driver.copy(reinterpret_cast<std::uintptr_t>(outputs[one.output]),
                  reinterpret_cast<std::uintptr_t>(inputs[one.input]),
                  static_cast<std::size_t>(one.bytes), stream);
    }
    for (Planned::Clear const& one : planned_.clears) {
      driver.clear(base + static_cast<std::uintptr_t>(one.offset),
                   static_cast<std::size_t>(one.bytes), stream);
    }
    for (std::size_t i = 0; i < planned_.launches.size(); ++i) {
      put(driver, planned_.launches[i], *kernels_[i], functions_[i], inputs, outputs, base, stream);
    }
  }

 private:
  // Room for one argument of any type.
  union Argument {
    std::uintptr_t pointer;
    std::int32_t i32;
    std::int64_t i64;
    float f32;
  };

  static void check(Kernel const& kernel, PlannedLaunch const& launch) {
    if (launch.values.size() != kernel.kinds.size()) {
      throw Error(kernel.entry + " takes " + std::to_string(kernel.kinds.size()) +
                  " arguments, the table has " + std::to_string(launch.values.size()));
    }
    for (std::size_t i = 0; i < kernel.kinds.size(); ++i) {
      Value const& value = launch.values[i];
      char const kind = kernel.kinds[i];
      auto const* whole = std::get_if<std::int64_t>(&value);
      bool const is_right =
          kind == 'p' ? std::holds_alternative<Address>(value) || (whole && *whole == 0)
          : kind == 'f' ? !std::holds_alternative<Address>(value)
          : kind == 'i' ? whole && *whole >= INT32_MIN && *whole <= INT32_MAX
                        : whole != nullptr;
      if (!is_right) {
        throw Error("argument " + std::to_string(i) + " of " + kernel.entry +
                    " is not of the type that it takes");
      }
    }
  }

  static std::uintptr_t address(Value const& value, void const* const* inputs, void* const* outputs,
                                std::uintptr_t workspace) {
    auto const* at = std::get_if<Address>(&value);
    if (!at) return 0;
    auto const offset = static_cast<std::uintptr_t>(at->offset);
    switch (at->of) {
      case Of::kInput: return reinterpret_cast<std::uintptr_t>(inputs[at->index]) + offset;
      case Of::kOutput: return reinterpret_cast<std::uintptr_t>(outputs[at->index]) + offset;
      case Of::kWorkspace: return workspace + offset;
      case Of::kNull: break;
    }
    return 0;
  }

  static void put(Driver& driver, PlannedLaunch const& launch, Kernel const& kernel, void* function,
                  void const* const* inputs, void* const* outputs, std::uintptr_t workspace,
                  void* stream) {
    Argument arguments[kMostOperands];
    void* pointers[kMostOperands];
    std::size_t const count = kernel.kinds.size() + kernel.hidden;
    for (std::size_t i = 0; i < count; ++i) {
      pointers[i] = &arguments[i];
      if (i >= kernel.kinds.size()) {
        arguments[i].pointer = 0;
        continue;
      }
      Value const& value = launch.values[i];
      auto const* whole = std::get_if<std::int64_t>(&value);
      switch (kernel.kinds[i]) {
        case 'p': arguments[i].pointer = address(value, inputs, outputs, workspace); break;
        case 'i': arguments[i].i32 = static_cast<std::int32_t>(*whole); break;
        case 'l': arguments[i].i64 = *whole; break;
        default:
          arguments[i].f32 = static_cast<float>(whole ? static_cast<double>(*whole)
                                                      : std::get<double>(value));
      }
    }
    cu::Attribute attributes[2] = {};
    unsigned given = 0;
    if (launch.dependent) {
      attributes[given].id = cu::kProgrammaticSerialization;
      attributes[given++].value.serialization = 1;
    }
    if (launch.cluster != Grid{1, 1, 1}) {
      attributes[given].id = cu::kClusterDimension;
      attributes[given++].value.cluster = {launch.cluster[0], launch.cluster[1], launch.cluster[2]};
    }
    auto const& [x, y, z] = launch.grid;
    cu::LaunchConfig const config{x,          y, z, kernel.threads, 1, 1, kernel.shared_bytes,
                                  stream, attributes, given};
    driver.launch(config, function, pointers, kernel.entry);
  }

  Planned planned_;
  std::vector<Kernel const*> kernels_;
  std::vector<void*> functions_;
};

}  // namespace lingc
