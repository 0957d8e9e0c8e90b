// SPDX-License-Identifier: Apache-2.0
// Status and Result.
#include "magicpig/core/error.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

namespace {

using namespace magicpig;

TEST_CASE("a status is success with an empty message unless it is made from an error") {
  const Status fine;
  CHECK(fine.ok());
  CHECK(fine.code() == ErrorCode::kOk);
  CHECK(std::strlen(fine.message()) == 0);

  const Status error = Status::error(ErrorCode::kShapeMismatch, "dim %d is not %s", 7, "eight");
  CHECK(!error.ok());
  CHECK(error.code() == ErrorCode::kShapeMismatch);
  CHECK(std::string(error.message()) == "dim 7 is not eight");
}

TEST_CASE("a message is cut at 247 characters and always ends") {
  const std::string text(1000, 'x');
  for (const std::size_t length : {246U, 247U, 248U, 1000U}) {
    CAPTURE(length);
    const Status status =
        Status::error(ErrorCode::kInvalidArgument, "%s", text.substr(0, length).c_str());
    CHECK(std::strlen(status.message()) == (length < 247 ? length : 247));
  }
}

TEST_CASE("a status is at most 256 bytes of plain data") {
  CHECK(sizeof(Status) <= 256);
  CHECK(std::is_trivially_copyable_v<Status>);
}

TEST_CASE("a result holds a value, of a type that only moves too") {
  Result<std::unique_ptr<int>> result(std::make_unique<int>(5));
  REQUIRE(result.ok());
  CHECK(result.status().ok());
  CHECK(**result == 5);
  const std::unique_ptr<int> taken = std::move(*result);
  CHECK(*taken == 5);
}

TEST_CASE("a result holds the reason where there is no value") {
  const Result<int> result(Status::error(ErrorCode::kOutOfMemory, "no memory for %d planes", 3));
  CHECK(!result.ok());
  CHECK(result.status().code() == ErrorCode::kOutOfMemory);
  CHECK(std::string(result.status().message()) == "no memory for 3 planes");
}

#if defined(__cpp_exceptions)
TEST_CASE("value() throws the message where there is no value") {
  CHECK(Result<int>(4).value() == 4);
  std::string message;
  try {
    (void)Result<int>(Status::error(ErrorCode::kNonFinite, "token %d", 9)).value();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message == "token 9");
}
#endif

}  // namespace
