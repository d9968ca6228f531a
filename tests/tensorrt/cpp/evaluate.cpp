// Runs calls of a plugin table through the sources of the C++ plugins, without TensorRT.
//
//   evaluate FOLDER < calls        each a line of JSON: table, call, shapes, and addresses as numbers
//
// What reaches the driver, the driver writes; after each call this writes {"end":true}, or the error.

#include <cstdio>
#include <iostream>
#include <string>

#include "../../../targets/tensorrt/cpp/step.hpp"

static std::vector<void*> addresses(lingc::Json const& value) {
  std::vector<void*> made;
  for (auto const& one : value.array()) {
    made.push_back(reinterpret_cast<void*>(static_cast<std::uintptr_t>(one.integer())));
  }
  return made;
}

static void run(lingc::Bundle& bundle, std::string const& line) {
  auto const value = lingc::Json::parse(line);
  auto const table = bundle.table(value["table"].text());
  auto const& call = table->calls.at(static_cast<std::size_t>(value["call"].integer()));
  std::vector<lingc::Shape> shapes;
  for (auto const& shape : value["shapes"].array()) {
    shapes.emplace_back();
    for (auto const& size : shape.array()) shapes.back().push_back(size.integer());
  }
  std::printf("{\"workspace\":%lld,\"timing\":\"%s\"}\n",
              static_cast<long long>(table->workspace_bytes(call)), table->timing_id(call).c_str());
  auto const places = addresses(value["places"]);  // the workspace and the stream
  lingc::Step const step(bundle, *table, call, shapes);
  step.run(addresses(value["inputs"]).data(), addresses(value["outputs"]).data(), places.at(0),
           places.at(1));
}

int main(int, char** given) {
  lingc::Bundle bundle({given[1]});
  for (std::string line; std::getline(std::cin, line);) {
    try {
      run(bundle, line);
      std::printf("{\"end\":true}\n");
    } catch (std::exception const& error) {
      std::string told;
      for (char const letter : std::string(error.what())) {
        if (letter == '"' || letter == '\\') told += '\\';
        told += letter < ' ' ? '?' : letter;  // bytes beyond ASCII are negative
      }
      std::printf("{\"error\":\"%s\"}\n", told.c_str());
    }
    std::fflush(stdout);
  }
}
