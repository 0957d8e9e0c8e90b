// SPDX-License-Identifier: Apache-2.0
// Profiles as JSON.
#include "profile.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <string>
#include <vector>

namespace {

using namespace magicpig;
using namespace magicpig::bench;

Profile every_kind() {
  return {.layers = {{.name = "a",
                      .heads = {{},
                                {.kind = HeadKind::kUniform, .budget = 0.1},
                                {.kind = HeadKind::kSignatures,
                                 .bits = 3,
                                 .budget = 0.02378414230005442,
                                 .temperature = 0.7,
                                 .certain = 0.25,
                                 .value_norms = false},
                                {.kind = HeadKind::kTables,
                                 .functions = 12,
                                 .tables = 48,
                                 .min_collisions = 1,
                                 .probe_radius = 1,
                                 .uniform_part = 0.005}}},
                     {.name = "b \"quoted\"",
                      .heads = {{.kind = HeadKind::kTrainedSignatures, .bits = 1, .budget = 1}}}}};
}

std::string message_of(const std::string& text) {
  return ProfileReader::parse(text).status().message();
}

// A profile of one layer "a" with one KV head.
std::string with_head(const std::string& head) {
  return R"({"profile": 1, "layers": [{"name": "a", "kv_heads": [)" + head + "]}]}";
}

}  // namespace

TEST_SUITE("Profile") {
  TEST_CASE("is read as it was written, to the last bit") {
    const Profile profile = every_kind();
    const auto read = ProfileReader::parse(to_json(profile, {{"error", 0.05}}));
    REQUIRE(read.ok());
    REQUIRE(read->layers.size() == 2);
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK(read->layers[i].name == profile.layers[i].name);
      CHECK(read->layers[i].heads == profile.layers[i].heads);
    }
    CHECK(read->layer("b \"quoted\"").ok());
    CHECK(std::string(read->layer("c").status().message()) == "the profile has no layer \"c\"");
  }

  TEST_CASE("takes what is not said as the sampler's own") {
    const auto read = ProfileReader::parse(
        with_head(R"({"kind": "trained_signatures", "bits": 2, "budget": 0.5})"));
    REQUIRE(read.ok());
    CHECK(read->layers[0].heads[0] ==
          HeadSetting{.kind = HeadKind::kTrainedSignatures, .bits = 2, .budget = 0.5});
    const auto tables =
        ProfileReader::parse(with_head(R"({"kind": "tables", "functions": 10, "tables": 150})"));
    REQUIRE(tables.ok());
    CHECK(tables->layers[0].heads[0] ==
          HeadSetting{.kind = HeadKind::kTables, .functions = 10, .tables = 150});
  }

  TEST_CASE("that is wrong is refused by the name of what is") {
    CHECK(message_of("{") == "this is not JSON");
    CHECK(message_of("[]") == "\"profile\" is not 1, the version that can be read");
    CHECK(message_of(R"({"profile": 2, "layers": []})") ==
          "\"profile\" is not 1, the version that can be read");
    CHECK(message_of(R"({"profile": 1, "layers": {}})") == "\"layers\" is not a list");
    CHECK(message_of(R"({"profile": 1, "layers": [3]})") == "a layer has no \"name\"");
    CHECK(message_of(R"({"profile": 1, "layers": [{"name": "a"}]})") ==
          "layer \"a\": \"kv_heads\" is not a list of settings");
    const std::string twice = R"({"name": "a", "kv_heads": [{"kind": "exact"}]},)"
                              R"({"name": "a", "kv_heads": [{"kind": "exact"}]})";
    CHECK(message_of(R"({"profile": 1, "layers": [)" + twice + "]}") == "two layers are \"a\"");
    const std::string head = "layer \"a\": KV head 0: ";
    CHECK(message_of(with_head("{}")) == head + "no \"kind\"");
    CHECK(message_of(with_head(R"({"kind": "magic"})")) == head + "no kind is called \"magic\"");
    CHECK(message_of(with_head(R"({"kind": "uniform"})")) == head + "no \"budget\"");
    CHECK(message_of(with_head(R"({"kind": "exact", "bits": 1})")) ==
          head + "\"bits\" says nothing about exact");
    CHECK(message_of(with_head(R"({"kind": "uniform", "budget": "x"})")) ==
          head + "\"budget\" is not a number");
    CHECK(message_of(with_head(R"({"kind": "uniform", "budget": 1.5})")) ==
          head + "budget 1.5 must lie in (0, 1]");
    const auto signatures = [&](const std::string& rest) {
      return message_of(with_head(R"({"kind": "signatures", "budget": 0.1, )" + rest + "}"));
    };
    for (const char* bits : {"0", "5", "1.5", "-1", "1e30", "4294967297"}) {
      CHECK(signatures(std::string("\"bits\": ") + bits) ==
            head + "\"bits\" is not a whole number from 1 to 4");
    }
    CHECK(signatures("\"temperature\": 1") == head + "no \"bits\"");
    CHECK(signatures("\"bits\": 1, \"temperature\": 9") ==
          head + "temperature 9 must lie in [0, 4]");
    CHECK(signatures("\"bits\": 1, \"certain\": 1") == head + "certain 1 must lie in [0, 1)");
    CHECK(signatures("\"bits\": 1, \"value_norms\": 1") ==
          head + "\"value_norms\" is neither true nor false");
    const auto tables = [&](const std::string& rest) {
      return message_of(with_head(R"({"kind": "tables", )" + rest + "}"));
    };
    const std::string both = "\"functions\": 10, \"tables\": 2, ";
    CHECK(tables("\"tables\": 2") == head + "no \"functions\"");
    CHECK(tables("\"functions\": 10") == head + "no \"tables\"");
    CHECK(tables(both + "\"budget\": 0.1") == head + "\"budget\" says nothing about tables");
    CHECK(tables("\"functions\": 16") == head + "\"functions\" is not a whole number from 1 to 15");
    CHECK(tables("\"tables\": 1025") == head + "\"tables\" is not a whole number from 1 to 1024");
    CHECK(tables(both + "\"min_collisions\": 1.5") ==
          head + "\"min_collisions\" is not a whole number from 1 to 3");
    CHECK(tables(both + "\"min_collisions\": 3") ==
          head + "min_collisions (t) 3 must lie in [1, 2]");
    CHECK(tables(both + "\"probe_radius\": 11") ==
          head + "probe_radius (r) 11 must lie in [0, 10]");
    CHECK(tables(both + "\"probe_radius\": \"1\"") == head + "\"probe_radius\" is not a number");
    CHECK(tables(both + "\"uniform_part\": 2") == head + "uniform_part 2 must lie in [0, 1]");
    CHECK(signatures("\"bits\": 1, \"tables\": 2") ==
          head + "\"tables\" says nothing about signatures");
  }

  TEST_CASE("a file that is not there is named") {
    CHECK(std::string(read_profile("absent.json").status().message()) ==
          "absent.json: cannot be read");
  }
}
