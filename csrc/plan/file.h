// Reads and checks a plan file before memory is allocated for its contents.
#pragma once

#include "plan/step.h"

namespace fastgen::plan {

// The bytes of a file.
struct File {
  cpu::Buffer<char> bytes;
  size_t size;

  static File read(const std::string& path);  // checks the header first
};

struct Contents {
  Header header;
  std::vector<std::unique_ptr<Step>> steps;
  const char* weights;  // in the file
};

// What the file holds; throws std::runtime_error unless all of it is consistent.
Contents parse(const File& file);

// Writes the checksum into the bytes of a file.
void seal(std::string& bytes);

}  // namespace fastgen::plan
