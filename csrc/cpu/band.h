// The unit of work of a convolution. Included once per instruction set (see isa.h).
namespace fastgen::cpu::FASTGEN_ISA {

// Some whole rows of some images of the output.
struct Band {
  int64_t first_image, last_image, first_row, last_row;
};

}  // namespace fastgen::cpu::FASTGEN_ISA
