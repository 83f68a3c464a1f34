#include "plan/file.h"

#include <fstream>

namespace fastgen::plan {
namespace {

constexpr int64_t kMaxPixels = 1 << 14, kMaxChannels = 1 << 24, kMaxElements = 1 << 28;
constexpr size_t kChecksummed = offsetof(Header, size);

void check(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// zlib's CRC-32, eight bytes at a time: table[k] advances a byte by k bytes.
uint32_t crc32(const char* bytes, size_t size) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t i = 0; i < 256; ++i) {
      tables[0][i] = i;
      for (int bit = 0; bit < 8; ++bit) tables[0][i] = tables[0][i] >> 1 ^ (tables[0][i] & 1 ? 0xedb88320u : 0);
    }
    for (size_t k = 1; k < 8; ++k)
      for (size_t i = 0; i < 256; ++i) tables[k][i] = tables[k - 1][i] >> 8 ^ tables[0][tables[k - 1][i] & 0xff];
    return tables;
  }();
  uint32_t crc = ~0u;
  for (; size >= 8; size -= 8, bytes += 8) {
    uint8_t eight[8];
    memcpy(eight, bytes, 8);
    for (int k = 0; k < 4; ++k) eight[k] ^= static_cast<uint8_t>(crc >> 8 * k);
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= table[7 - k][eight[k]];
  }
  for (; size; --size, ++bytes) crc = table[0][(crc ^ static_cast<uint8_t>(*bytes)) & 0xff] ^ crc >> 8;
  return ~crc;
}

Header check_header(const char* bytes, size_t size) {
  check(size >= sizeof(Header), "it is too short for a plan");
  Header header;
  memcpy(&header, bytes, sizeof(header));
  check(!memcmp(header.magic, kMagic, sizeof(kMagic)), "it is not a plan");
  check(header.version == kVersion, "it is a plan of version " + std::to_string(header.version) +
                                        ", and this fastgen reads version " + std::to_string(kVersion) +
                                        ": export the model again (`fastgen export`, or Engine.save)");
  check(header.size == static_cast<int64_t>(size),
        "it is cut short or damaged: " + std::to_string(size) + " bytes of " + std::to_string(header.size));
  const int64_t rest = header.size - static_cast<int64_t>(sizeof(Header));
  check(within(header.records, 0, rest) && header.weights == rest - header.records,
        "it is damaged: it cannot hold its steps and weights");
  return header;
}

void check_numbers(const Header& header) {
  check(within(static_cast<int64_t>(header.precision), 0, kPrecisions - 1), "the plan has an unknown precision");
  check(header.precision <= Precision::bfloat16, std::string("the plan's precision is ") + name(header.precision) +
                                                     ", and this version of fastgen runs float32 and bfloat16");
  check(!(header.error < 0 || std::isinf(header.error)), "the plan's measured error is not a valid number");
}

bool has_possible_size(const Shape& shape) {
  return within(shape.c, 1, kMaxChannels) && within(shape.h, 1, kMaxPixels) && within(shape.w, 1, kMaxPixels) &&
         shape.c * shape.h <= kMaxElements && shape.elements() <= kMaxElements;
}

// The name in a record; empty if it is not valid.
std::string kind_of(const Record& record) {
  const char* const end = record.kind + sizeof(record.kind);
  const char* const last = std::find(record.kind, end, '\0');
  const auto is_letter = [](char c) { return ('a' <= c && c <= 'z') || ('0' <= c && c <= '9') || c == '_'; };
  const bool is_name = std::all_of(record.kind, last, is_letter) && std::all_of(last, end, [](char c) { return !c; });
  return is_name ? std::string(record.kind, last) : std::string();
}

// Reads and checks a step of the file. `previous`: the steps before it.
std::unique_ptr<Step> parse_step(const Header& header, const char* bytes, size_t at, size_t end,
                                 const std::vector<std::unique_ptr<Step>>& previous) {
  const auto number = static_cast<int64_t>(previous.size());
  const std::string place = "step " + std::to_string(number) + " of the plan ";
  Record record;
  check(end - at >= sizeof(record), place + "is beyond the file's end");
  memcpy(&record, bytes + at, sizeof(record));
  const std::string kind = kind_of(record);
  std::unique_ptr<Step> step = make_step(kind);
  check(step != nullptr, place + "is of " + (kind.empty() ? "an unknown kind" : "the unknown kind " + kind));
  const auto rest = static_cast<int64_t>(end - at - sizeof(record)), fields = static_cast<int64_t>(step->fields_size());
  constexpr auto kRead = static_cast<int64_t>(sizeof(Read));
  check(within(record.inputs, 0, rest / kRead) && record.inputs * kRead + fields <= rest &&
            record.size == static_cast<int64_t>(sizeof(record)) + record.inputs * kRead + fields,
        place + "(" + kind + ") has a record of the wrong size");

  const Check check_step(number, kind, header);
  step->shape = record.shape;
  check_step(has_possible_size(step->shape), "has an impossible size");
  step->inputs.resize(static_cast<size_t>(record.inputs));
  memcpy(step->inputs.data(), bytes + at + sizeof(record), step->inputs.size() * sizeof(Read));
  for (const Read& read : step->inputs) {
    check_step(has_possible_size(read.shape), "has an impossible size");
    check_step(within(read.value, 0, number - 1) && previous[read.value]->computes() == step->reads() &&
                   previous[read.value]->shape.elements() == read.shape.elements(),
               "reads a value that does not exist");
  }
  step->fields_at = at + static_cast<size_t>(record.size - fields);
  step->read_fields(bytes + step->fields_at);
  step->check(check_step);
  return step;
}

}  // namespace

File File::read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("it cannot be opened");
  const auto size = static_cast<int64_t>(file.tellg());
  file.seekg(0);
  char start[sizeof(Header)] = {};
  file.read(start, static_cast<std::streamsize>(std::min<int64_t>(size, sizeof(start))));
  check_header(start, static_cast<size_t>(std::max<int64_t>(size, 0)));
  File result{cpu::scratch<char>(size), static_cast<size_t>(size)};
  file.seekg(0);
  if (!file.read(result.bytes.get(), size)) throw std::runtime_error("it cannot be read to its end");
  return result;
}

Contents parse(const File& file) {
  const char* const bytes = file.bytes.get();
  Contents contents{check_header(bytes, file.size), {}, nullptr};
  const Header& header = contents.header;
  check(crc32(bytes + kChecksummed, file.size - kChecksummed) == header.checksum,
        "it is damaged: its checksum is wrong");
  check_numbers(header);
  size_t at = sizeof(Header);
  const size_t end = at + static_cast<size_t>(header.records);
  while (at < end) {
    contents.steps.push_back(parse_step(header, bytes, at, end, contents.steps));
    at = contents.steps.back()->fields_at + contents.steps.back()->fields_size();
  }
  check(static_cast<int64_t>(contents.steps.size()) == header.steps,
        "the plan does not have the number of steps in its header");
  contents.weights = bytes + end;
  return contents;
}

void seal(std::string& bytes) {
  const uint32_t checksum = crc32(bytes.data() + kChecksummed, bytes.size() - kChecksummed);
  memcpy(bytes.data() + offsetof(Header, checksum), &checksum, sizeof(checksum));
}

}  // namespace fastgen::plan
