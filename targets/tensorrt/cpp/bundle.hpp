// Folders with plugin tables and kernels, unpacked, each file named by its SHA-256 and held to it.
//
//   <sha256>.json    a plugin table, as the fields of a plugin name it
//   <sha256>.kernel  a kernel, as a table names it: magic, SHA-256, length of the header, header, ELF

#pragma once

#include <dirent.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "json.hpp"
#include "sha256.hpp"
#include "table.hpp"

namespace lingc {

// Do something; where it fails, say what with.
template <typename Work>
auto named(std::string const& what, Work const& work) {
  try {
    return work();
  } catch (Error const& error) {
    throw Error(what + ": " + error.what());
  }
}

// A device function, compiled.
struct Kernel {
  std::string entry, arch;
  std::vector<char> kinds;  // of its arguments: p(ointer), i (32 bits), l (64 bits), f(loat)
  std::size_t hidden;       // trailing pointers beyond those, which are passed as null
  unsigned threads, shared_bytes;
  std::string code;

  static Kernel parse(std::string const& data) {
    constexpr std::string_view kMagic = "lingck2\n";
    constexpr std::size_t kStart = kMagic.size() + 32;
    if (data.compare(0, kMagic.size(), kMagic) != 0 || data.size() < kStart + 4) {
      throw Error("it is no kernel");
    }
    std::size_t length = 0;
    for (int i = 3; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(data[kStart + i]);
    if (length > data.size() - kStart - 4) throw Error("its header is cut off");
    Json const header = Json::parse(std::string_view(data).substr(kStart + 4, length));
    Kernel made{header["entry"].text(), header["arch"].text(), {}, 0, 0, 0,
                data.substr(kStart + 4 + length)};
    for (Json const& one : header["arguments"].array()) made.kinds.push_back(kind(one[1].text()));
    made.hidden = static_cast<std::size_t>(whole(header["hidden"], kMostOperands));
    made.threads = static_cast<unsigned>(whole(header["threads"], 1024));
    made.shared_bytes = static_cast<unsigned>(whole(header["shared_bytes"], 1 << 20));
    if (made.kinds.size() + made.hidden > kMostOperands) throw Error("it takes too many arguments");
    return made;
  }

 private:
  static std::int64_t whole(Json const& value, std::int64_t most) {
    std::int64_t const found = value.integer();
    if (found < 0 || found > most) throw Error("its header has " + std::to_string(found));
    return found;
  }

  static char kind(std::string const& type) {
    if (type[0] == '*') return 'p';
    std::string const name = type.substr(0, type.find(':'));  // i32:16 is a multiple of 16
    if (name == "i32") return 'i';
    if (name == "i64") return 'l';
    if (name == "f32") return 'f';
    throw Error("it takes a \"" + type + "\", which is unknown");
  }
};

class Bundle {
 public:
  // Folders to look in, in order.
  explicit Bundle(std::vector<std::string> folders) : folders_(std::move(folders)) {}

  // The table of that digest.
  std::shared_ptr<Table const> table(std::string const& digest) {
    std::lock_guard const lock(mutex_);
    auto& held = tables_[digest];
    if (!held) {
      std::string const name = digest + ".json";
      held = std::make_shared<Table const>(
          named("plugin table " + name, [&] { return Table::parse(file(digest, name)); }));
    }
    return held;
  }

  // A kernel of a table; it stays where it is.
  Kernel const& kernel(Table const& table, std::size_t number) {
    std::lock_guard const lock(mutex_);
    std::string const& digest = table.images.at(number);
    auto& held = kernels_[digest];
    if (!held) {
      std::string const name = digest + ".kernel";
      held = std::make_unique<Kernel const>(
          named("kernel " + name, [&] { return Kernel::parse(file(digest, name)); }));
    }
    if (held->arch != table.arch) {
      throw Error("kernel " + digest + " is compiled for " + held->arch + ", the table is for " +
                  table.arch);
    }
    return *held;
  }

  // Digests of all tables that lie there.
  std::vector<std::string> digests() const {
    std::vector<std::string> made;
    for (std::string const& folder : folders_) {
      std::unique_ptr<DIR, int (*)(DIR*)> const open(opendir(folder.c_str()), closedir);
      while (dirent const* entry = open ? readdir(open.get()) : nullptr) {
        std::string const name = entry->d_name;
        if (is_digest(name.substr(0, 64)) && name.substr(64) == ".json") {
          made.push_back(name.substr(0, 64));
        }
      }
    }
    std::sort(made.begin(), made.end());
    made.erase(std::unique(made.begin(), made.end()), made.end());
    return made;
  }

  // The folders, to be told.
  std::string where() const {
    std::string made;
    for (std::string const& one : folders_) made += (made.empty() ? "" : ":") + one;
    return made;
  }

 private:
  static bool is_digest(std::string const& text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
  }

  std::string file(std::string const& digest, std::string const& name) const {
    if (!is_digest(digest)) throw Error("\"" + digest + "\" is no SHA-256");
    for (std::string const& folder : folders_) {
      std::ifstream open(folder + "/" + name, std::ios::binary);
      if (!open) continue;
      std::string data(std::istreambuf_iterator<char>(open), {});
      std::string const found = Sha256::of(data);
      if (found == digest) return data;
      throw Error("it is not what it was: its SHA-256 in \"" + folder + "\" is " + found);
    }
    throw Error("it is not in \"" + where() +
                "\"; LINGC_PLUGINS names the folder that `lingc deploy` wrote");
  }

  std::vector<std::string> folders_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Table const>> tables_;
  std::map<std::string, std::unique_ptr<Kernel const>> kernels_;
};

}  // namespace lingc
