// JSON as plugin tables and kernel headers have it: ASCII, whole numbers apart from others.

#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace lingc {

// What is wrong with a file, a table or a step, in one sentence that names it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  bool is_integer() const { return std::holds_alternative<std::int64_t>(value_); }
  bool is_object() const { return std::holds_alternative<Object>(value_); }
  bool is_array() const { return std::holds_alternative<Array>(value_); }

  bool boolean() const { return as<bool>("true or false"); }
  std::int64_t integer() const { return as<std::int64_t>("a whole number"); }
  double number() const {
    return is_integer() ? static_cast<double>(integer()) : as<double>("a number");
  }
  std::string const& text() const { return as<std::string>("a text"); }
  Array const& array() const { return as<Array>("a list"); }
  Object const& object() const { return as<Object>("an object"); }

  // A field of an object.
  Json const& operator[](std::string const& name) const {
    auto const found = object().find(name);
    if (found == object().end()) throw Error("there is no \"" + name + "\"");
    return found->second;
  }

  // An element of a list.
  Json const& operator[](std::size_t index) const {
    if (index >= array().size()) {
      throw Error("a list has " + std::to_string(array().size()) + " elements, number " +
                  std::to_string(index) + " is wanted");
    }
    return array()[index];
  }

  // One value with nothing but blanks around it.
  static Json parse(std::string_view text);

 private:
  friend class JsonParser;
  template <typename T>
  T const& as(char const* what) const {
    if (auto const* found = std::get_if<T>(&value_)) return *found;
    throw Error(std::string("a value is not ") + what);
  }

  std::variant<std::monostate, bool, std::int64_t, double, std::string, Array, Object> value_;
};

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json whole() {
    Json made = value(0);
    blanks();
    if (at_ != text_.size()) fail("something follows the value");
    return made;
  }

 private:
  static constexpr int kDeepest = 32;

  Json value(int depth) {
    if (depth > kDeepest) fail("it is nested too deep");
    blanks();
    Json made;
    switch (peek()) {
      case '{': made.value_ = object(depth); break;
      case '[': made.value_ = array(depth); break;
      case '"': made.value_ = string(); break;
      case 't': word("true"); made.value_ = true; break;
      case 'f': word("false"); made.value_ = false; break;
      case 'n': word("null"); break;
      default: number(made);
    }
    return made;
  }

  Json::Object object(int depth) {
    Json::Object made;
    ++at_;
    if (skip('}')) return made;
    do {
      blanks();
      std::string name = string();
      if (!skip(':')) fail("a colon is missing");
      if (!made.emplace(std::move(name), value(depth + 1)).second) fail("a name is given twice");
    } while (skip(','));
    if (!skip('}')) fail("an object does not end");
    return made;
  }

  Json::Array array(int depth) {
    Json::Array made;
    ++at_;
    if (skip(']')) return made;
    do {
      made.push_back(value(depth + 1));
    } while (skip(','));
    if (!skip(']')) fail("a list does not end");
    return made;
  }

  std::string string() {
    if (peek() != '"') fail("a text is missing");
    std::string made;
    for (++at_; peek() != '"'; ++at_) {
      char letter = text_[at_];
      if (letter == '\\') {
        ++at_;
        letter = escaped();
      }
      made.push_back(letter);
    }
    ++at_;
    return made;
  }

  char escaped() {
    switch (peek()) {
      case '"': case '\\': case '/': return text_[at_];
      case 'b': return '\b';
      case 'f': return '\f';
      case 'n': return '\n';
      case 'r': return '\r';
      case 't': return '\t';
      case 'u': {
        // Names are ASCII; anything else is kept as one letter, for nothing is looked up by it.
        if (at_ + 4 >= text_.size()) fail("a letter is cut off");
        unsigned code = 0;
        auto const* first = text_.data() + at_ + 1;
        auto const [end, error] = std::from_chars(first, first + 4, code, 16);
        if (error != std::errc() || end != first + 4) fail("a letter is no number");
        at_ += 4;
        return code < 128 ? static_cast<char>(code) : '?';
      }
      default: fail("an unknown escape");
    }
  }

  void number(Json& made) {
    std::size_t const begin = at_;
    while (at_ < text_.size() && std::string_view("+-.0123456789eE").find(text_[at_]) !=
                                     std::string_view::npos) {
      ++at_;
    }
    auto const digits = text_.substr(begin, at_ - begin);
    auto const* last = digits.data() + digits.size();
    if (digits.find_first_of(".eE") == std::string_view::npos) {
      std::int64_t whole = 0;
      auto const [end, error] = std::from_chars(digits.data(), last, whole);
      if (digits.empty() || error != std::errc() || end != last) fail("no value");
      made.value_ = whole;
      return;
    }
    // Not strtod, which reads by the locale of the process.
    double real = 0;
    auto const [end, error] = std::from_chars(digits.data(), last, real);
    if (error != std::errc() || end != last) fail("no number");
    made.value_ = real;
  }

  void word(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) fail("no value");
    at_ += wanted.size();
  }

  bool skip(char letter) {
    blanks();
    if (at_ == text_.size() || text_[at_] != letter) return false;
    ++at_;
    return true;
  }

  void blanks() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) !=
                                     std::string_view::npos) {
      ++at_;
    }
  }

  char peek() const {
    if (at_ == text_.size()) fail("it ends too early");
    return text_[at_];
  }

  [[noreturn]] void fail(char const* what) const {
    throw Error(std::string("no JSON at byte ") + std::to_string(at_) + ": " + what);
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

inline Json Json::parse(std::string_view text) { return JsonParser(text).whole(); }

}  // namespace lingc
