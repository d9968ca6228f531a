// The C++ plugins' way to the driver as a function of C, for Python to call with real memory.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../../targets/tensorrt/cpp/step.hpp"

// Puts a call of a table on a stream. `sizes` are all axes of all inputs, one after the other; ranks
// say where each ends. The answer is what is wrong, or nothing; it lives until the next call.
extern "C" char const* launch(char const* folder, char const* digest, std::int64_t call,
                              std::int64_t const* sizes, void const* const* inputs,
                              void* const* outputs, void* workspace, void* stream) {
  static std::map<std::string, std::unique_ptr<lingc::Bundle>> bundles;
  static std::string told;
  told.clear();
  try {
    auto& bundle = bundles[folder];
    if (!bundle) bundle = std::make_unique<lingc::Bundle>(std::vector<std::string>{folder});
    auto const table = bundle->table(digest);
    auto const& wanted = table->calls.at(static_cast<std::size_t>(call));
    std::vector<lingc::Shape> shapes;
    for (auto const& input : wanted.inputs) {
      shapes.emplace_back(sizes, sizes + input.rank);
      sizes += input.rank;
    }
    lingc::Step(*bundle, *table, wanted, shapes).run(inputs, outputs, workspace, stream);
  } catch (std::exception const& error) {
    told = error.what();
  }
  return told.c_str();
}
