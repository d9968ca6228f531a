// A plugin table (lingc/plugin_table.py), and what of it one run of a plugin is: copies, bytes to
// clear and launches, over addresses that are not known yet.

#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "json.hpp"
#include "sha256.hpp"

namespace lingc {

constexpr std::int64_t kFormat = 2;      // of the table
constexpr std::size_t kMostOperands = 64;  // of a launch, hidden ones included
constexpr std::int64_t kAlignment = 256;  // of each workspace
constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;  // of one, and of a tactic's
constexpr std::size_t kMostAxes = 8;  // of a tensor of TensorRT's

using Shape = std::vector<std::int64_t>;
using Grid = std::array<unsigned, 3>;

// Sums and products of what a table says; one that 64 bits do not hold is no size of anything.
inline std::int64_t sum(std::int64_t left, std::int64_t right) {
  std::int64_t made = 0;
  if (__builtin_add_overflow(left, right, &made)) {
    throw Error("64 bits do not hold " + std::to_string(left) + " + " + std::to_string(right));
  }
  return made;
}

inline std::int64_t product(std::int64_t left, std::int64_t right) {
  std::int64_t made = 0;
  if (__builtin_mul_overflow(left, right, &made)) {
    throw Error("64 bits do not hold " + std::to_string(left) + " * " + std::to_string(right));
  }
  return made;
}

// A size of an input, times a number.
struct Axis {
  std::size_t input, axis;
  std::int64_t times;

  std::int64_t size(std::vector<Shape> const& shapes) const {
    if (input >= shapes.size() || axis >= shapes[input].size()) {
      throw Error("a size is read from axis " + std::to_string(axis) + " of input " +
                  std::to_string(input) + ", which is not there");
    }
    return product(shapes[input][axis], times);
  }
};

using Dim = std::variant<std::int64_t, Axis>;

struct Input {
  std::string name, dtype;
  std::size_t rank;
};

struct Output {
  std::string name, dtype;
  std::vector<Dim> shape;
  std::int64_t place;  // number of the input that is updated in place and this is, else -1
};

// An address of an argument, a result or a workspace, by the op's own name.
struct Place {
  std::string name;
  std::int64_t offset;
};

// slots * (number of slots) + pages * (number of pages) + plus
struct Counted {
  std::int64_t slots, pages, plus;
};

using Operand = std::variant<std::monostate, std::int64_t, double, Place, Counted>;

struct Launch {
  std::size_t kernel;
  Grid grid, cluster;
  bool dependent;  // it may begin before the one before it has ended
  std::vector<Operand> operands;
};

using Spaces = std::vector<std::pair<std::string, std::int64_t>>;

struct Tactic {
  std::string op;
  std::vector<Launch> launches;
  Spaces workspaces, counters;

  std::int64_t workspace_bytes() const;
};

struct Call {
  std::string op;
  std::vector<Input> inputs;
  std::vector<Output> outputs;
  std::vector<Axis> axes;
  std::map<std::vector<std::int64_t>, std::size_t> choices;
  std::optional<Axis> slots, rows;
};

// -------------------------------------------------------------------------------- one run of a call

enum class Of { kNull, kInput, kOutput, kWorkspace };

struct Address {
  Of of = Of::kNull;
  std::size_t index = 0;  // of the input or output
  std::int64_t offset = 0;
};

using Value = std::variant<Address, std::int64_t, double>;

struct PlannedLaunch {
  std::size_t kernel;
  Grid grid, cluster;
  bool dependent;
  std::vector<Value> values;
};

struct Planned {
  struct Copy {
    std::size_t output, input;
    std::int64_t bytes;
  };
  struct Clear {
    std::int64_t offset, bytes;
  };
  std::vector<Copy> copies;  // unless both are one place
  std::vector<Clear> clears;  // of the workspace
  std::vector<PlannedLaunch> launches;
};

// ------------------------------------------------------------------------------------------ a table

inline std::int64_t aligned(std::int64_t size) {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

inline std::int64_t Tactic::workspace_bytes() const {
  std::int64_t total = 0;
  for (auto const* spaces : {&workspaces, &counters}) {
    for (auto const& [name, size] : *spaces) total = sum(total, aligned(size));
  }
  return total;
}

inline std::int64_t bytes_of(std::string const& dtype) {
  static std::map<std::string, std::int64_t> const kBytes{
      {"f32", 4}, {"bf16", 2}, {"f8e4m3", 1}, {"i32", 4}, {"i64", 8}, {"u8", 1}};
  auto const found = kBytes.find(dtype);
  if (found == kBytes.end()) throw Error("there is no element type \"" + dtype + "\"");
  return found->second;
}

inline std::int64_t size_of(Dim const& dim, std::vector<Shape> const& shapes) {
  auto const* axis = std::get_if<Axis>(&dim);
  return axis ? axis->size(shapes) : std::get<std::int64_t>(dim);
}

class Table {
 public:
  std::string target, arch;
  std::int64_t page_size = 0;
  std::vector<std::string> images;  // digests of the kernels' files, by number
  std::vector<Tactic> tactics;
  std::vector<Call> calls;

  static Table parse(std::string_view text) {
    Json const value = Json::parse(text);
    std::int64_t const format = value["format"].integer();
    if (format != kFormat) {
      throw Error("it has format " + std::to_string(format) + ", this library reads " +
                  std::to_string(kFormat));
    }
    Table made;
    made.target = value["target"].text();
    made.arch = value["arch"].text();
    made.page_size = value["page_size"].integer();
    if (made.page_size < 1) throw Error("its page size is " + std::to_string(made.page_size));
    for (Json const& one : value["images"].array()) made.images.push_back(one.text());
    for (Json const& one : value["tactics"].array()) made.tactics.push_back(made.tactic(one));
    for (Json const& one : value["calls"].array()) made.calls.push_back(made.call(one));
    return made;
  }

  // The most that any choice of a call needs.
  std::int64_t workspace_bytes(Call const& call) const {
    std::int64_t most = 0;
    for (auto const& [sizes, index] : call.choices) {
      most = std::max(most, tactics[index].workspace_bytes());
    }
    return most;
  }

  // What a call's time is kept under by TensorRT, as `timing_id` of lingc/runtime/tensorrt_plugin.py
  // writes it: all that is launched, for any sizes, but for numbers that are not whole.
  std::string timing_id(Call const& call) const {
    std::string told = arch + " " + std::to_string(page_size);
    for (Axis const& axis : call.axes) told += " " + written(axis);
    for (auto const* axis : {&call.slots, &call.rows}) {
      told += " " + (*axis ? written(**axis) : std::string("-"));
    }
    for (Output const& one : call.outputs) told += " " + std::to_string(one.place);
    for (auto const& [sizes, index] : call.choices) {
      told += " " + listed(sizes) + ":";
      for (auto const* spaces : {&tactics[index].workspaces, &tactics[index].counters}) {
        for (auto const& [name, size] : *spaces) told += " " + name + "=" + std::to_string(size);
      }
      for (Launch const& one : tactics[index].launches) {
        told += " " + images[one.kernel] + " " + listed(one.grid) + " " + listed(one.cluster) +
                (one.dependent ? " 1" : " 0");
        for (Operand const& operand : one.operands) told += " " + written(operand);
      }
    }
    return call.op + "-" + Sha256::of(told);
  }

  // The tactic for inputs of these shapes; null where there is none for such sizes.
  Tactic const* tactic(Call const& call, std::vector<Shape> const& shapes) const {
    auto const found = call.choices.find(sizes(call, shapes));
    return found == call.choices.end() ? nullptr : &tactics[found->second];
  }

  // What a call does for inputs of these shapes.
  Planned plan(Call const& call, std::vector<Shape> const& shapes) const {
    check(call, shapes);
    Tactic const* chosen = tactic(call, shapes);
    if (!chosen) throw Error(none(call, shapes));
    Planned made;
    std::map<std::string, Address> places;
    for (std::size_t i = 0; i < call.inputs.size(); ++i) {
      places[call.inputs[i].name] = {Of::kInput, i, 0};
    }
    for (std::size_t i = 0; i < call.outputs.size(); ++i) {
      Output const& one = call.outputs[i];
      places[one.name] = {Of::kOutput, i, 0};
      if (one.place < 0) continue;
      std::int64_t size = bytes_of(one.dtype);
      for (Dim const& dim : one.shape) size = product(size, size_of(dim, shapes));
      made.copies.push_back({i, static_cast<std::size_t>(one.place), size});
    }
    std::int64_t at = 0;
    for (auto const& [name, size] : chosen->workspaces) {
      places[name] = {Of::kWorkspace, 0, at};
      at += aligned(size);
    }
    for (auto const& [name, size] : chosen->counters) {
      places[name] = {Of::kWorkspace, 0, at};
      made.clears.push_back({at, size});
      at += aligned(size);
    }
    std::int64_t const slots = call.slots ? call.slots->size(shapes) - 1 : 0;
    std::int64_t const pages = call.rows ? (call.rows->size(shapes) - 1) / page_size : 0;
    for (Launch const& one : chosen->launches) {
      // What TensorRT ran before is not known to let another launch begin early.
      PlannedLaunch launch{one.kernel, one.grid, one.cluster,
                           one.dependent && !made.launches.empty(), {}};
      for (Operand const& operand : one.operands) {
        launch.values.push_back(value(operand, places, slots, pages));
      }
      made.launches.push_back(std::move(launch));
    }
    return made;
  }

 private:
  static Value value(Operand const& operand, std::map<std::string, Address> const& places,
                     std::int64_t slots, std::int64_t pages) {
    if (auto const* whole = std::get_if<std::int64_t>(&operand)) return *whole;
    if (auto const* real = std::get_if<double>(&operand)) return *real;
    if (auto const* counted = std::get_if<Counted>(&operand)) {
      return sum(sum(product(counted->slots, slots), product(counted->pages, pages)),
                 counted->plus);
    }
    auto const* place = std::get_if<Place>(&operand);
    if (!place) return Address{};
    auto const found = places.find(place->name);
    if (found == places.end()) return Address{};  // an optional argument that is absent
    Address made = found->second;
    made.offset = sum(made.offset, place->offset);
    return made;
  }

  static std::vector<std::int64_t> sizes(Call const& call, std::vector<Shape> const& shapes) {
    std::vector<std::int64_t> made;
    for (Axis const& axis : call.axes) made.push_back(axis.size(shapes));
    return made;
  }

  static void check(Call const& call, std::vector<Shape> const& shapes) {
    if (shapes.size() != call.inputs.size()) {
      throw Error("it takes " + std::to_string(call.inputs.size()) + " inputs and has " +
                  std::to_string(shapes.size()));
    }
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      auto const named = "input \"" + call.inputs[i].name + "\" has ";
      if (shapes[i].size() != call.inputs[i].rank) {
        throw Error(named + std::to_string(shapes[i].size()) + " axes, " +
                    std::to_string(call.inputs[i].rank) + " are wanted");
      }
      for (std::int64_t const size : shapes[i]) {
        if (size < 0) throw Error(named + "a size of " + std::to_string(size));
      }
    }
  }

  template <typename Sizes>
  static std::string listed(Sizes const& sizes) {
    std::string made;
    for (auto const one : sizes) made += (made.empty() ? "" : "x") + std::to_string(one);
    return made;
  }

  static std::string written(Axis const& axis) {
    return std::to_string(axis.input) + "." + std::to_string(axis.axis) + "*" +
           std::to_string(axis.times);
  }

  static std::string written(Operand const& operand) {
    if (auto const* place = std::get_if<Place>(&operand)) {
      return place->name + "+" + std::to_string(place->offset);
    }
    if (auto const* counted = std::get_if<Counted>(&operand)) {
      return std::to_string(counted->slots) + "," + std::to_string(counted->pages) + "," +
             std::to_string(counted->plus);
    }
    if (auto const* whole = std::get_if<std::int64_t>(&operand)) return std::to_string(*whole);
    return std::holds_alternative<double>(operand) ? "~" : "-";
  }

  static std::string none(Call const& call, std::vector<Shape> const& shapes) {
    std::string known;
    int shown = 0;
    for (auto const& [sizes, index] : call.choices) {
      if (++shown > 8) break;
      known += (known.empty() ? "" : ", ") + listed(sizes);
    }
    return "there are no launches for sizes " + listed(sizes(call, shapes)) +
           "; pad the step to one of the engine's buckets: " + known + ", ...";
  }

  // ---------------------------------------------------------------------------------------- reading

  static std::size_t index(Json const& value, std::size_t end, char const* what) {
    std::int64_t const found = value.integer();
    if (found < 0 || static_cast<std::size_t>(found) >= end) {
      throw Error(std::string("there is no ") + what + " " + std::to_string(found));
    }
    return static_cast<std::size_t>(found);
  }

  static Grid grid(Json const& value) {
    Grid made{};
    for (std::size_t i = 0; i < made.size(); ++i) {
      std::int64_t const size = value[i].integer();
      if (size < 1 || size > INT32_MAX) throw Error("a grid of " + std::to_string(size) + " blocks");
      made[i] = static_cast<unsigned>(size);
    }
    return made;
  }

  static Operand operand(Json const& value) {
    if (value.is_null()) return {};
    if (value.is_integer()) return value.integer();
    if (!value.is_object()) return value.number();
    auto const& fields = value.object();
    if (fields.count("at")) {
      return Place{value["at"].text(), fields.count("offset") ? value["offset"].integer() : 0};
    }
    return Counted{value["slots"].integer(), value["pages"].integer(), value["plus"].integer()};
  }

  static Spaces spaces(Json const& value) {
    Spaces made;
    for (Json const& one : value.array()) {
      std::int64_t const size = one[1].integer();
      if (size < 0 || size > kMostBytes) {
        throw Error("a workspace of " + std::to_string(size) + " bytes");
      }
      made.emplace_back(one[0].text(), size);
    }
    return made;
  }

  Tactic tactic(Json const& value) const {
    Tactic made{value["op"].text(), {}, spaces(value["workspaces"]), spaces(value["counters"])};
    if (std::int64_t const size = made.workspace_bytes(); size > kMostBytes) {
      throw Error("workspaces of " + std::to_string(size) + " bytes");
    }
    for (Json const& one : value["launches"].array()) {
      Launch launch{index(one["kernel"], images.size(), "kernel"), grid(one["grid"]),
                    grid(one["cluster"]), one["dependent"].boolean(), {}};
      for (Json const& each : one["operands"].array()) launch.operands.push_back(operand(each));
      made.launches.push_back(std::move(launch));
    }
    return made;
  }

  static Axis axis(Json const& value, std::vector<Input> const& inputs) {
    std::size_t const input = index(value[0], inputs.size(), "input");
    Axis const made{input, index(value[1], inputs[input].rank, "axis"), value[2].integer()};
    if (made.times < 1) throw Error("a size is taken " + std::to_string(made.times) + " times");
    return made;
  }

  Call call(Json const& value) const {
    Call made;
    made.op = value["op"].text();
    for (Json const& one : value["inputs"].array()) {
      made.inputs.push_back({one[0].text(), one[1].text(), index(one[2], kMostAxes + 1, "rank")});
      bytes_of(made.inputs.back().dtype);
    }
    for (Json const& one : value["outputs"].array()) {
      Output output{one["name"].text(), one["dtype"].text(), {}, one["place"].integer()};
      bytes_of(output.dtype);
      if (output.place != -1) index(one["place"], made.inputs.size(), "input");
      for (Json const& dim : one["shape"].array()) {
        if (dim.is_array()) {
          output.shape.emplace_back(axis(dim, made.inputs));
        } else {
          output.shape.emplace_back(dim.integer());
          if (dim.integer() < 0) {
            throw Error("output \"" + output.name + "\" has a size of " +
                        std::to_string(dim.integer()));
          }
        }
      }
      if (output.shape.size() > kMostAxes) {
        throw Error("output \"" + output.name + "\" has " + std::to_string(output.shape.size()) +
                    " axes, TensorRT has " + std::to_string(kMostAxes));
      }
      made.outputs.push_back(std::move(output));
    }
    for (Json const& one : value["axes"].array()) made.axes.push_back(axis(one, made.inputs));
    for (Json const& one : value["choices"].array()) {
      std::vector<std::int64_t> sizes;
      for (std::size_t i = 0; i < made.axes.size(); ++i) sizes.push_back(one[i].integer());
      made.choices[sizes] = index(one[made.axes.size()], tactics.size(), "tactic");
    }
    if (!value["slots"].is_null()) made.slots = axis(value["slots"], made.inputs);
    if (!value["rows"].is_null()) made.rows = axis(value["rows"], made.inputs);
    return made;
  }
};

}  // namespace lingc
