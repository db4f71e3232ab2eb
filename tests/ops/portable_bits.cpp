// Products of the portable kernels, printed to the last bit: the same program for two processors prints the same.
#define CIUIC_ISA portable
#include "kernels_isa.cpp"

#include <cstdio>
#include <vector>

using namespace ciuic;
using namespace ciuic::portable;

struct Draw {
    uint32_t state = 1;
    uint32_t bits() { return state = state * 1664525u + 1013904223u, state >> 8; }
    float real() { return static_cast<float>(bits() % 2001) / 1000.0f - 1.0f; }
};

int main() {
    ThreadPool pool(2, {});
    Arena arena;
    const Context context{&pool, &arena};
    for (Layout layout : {Layout::w4g128_t16, Layout::w8g128_t16, Layout::bf16_rows, Layout::f32_rows})
        for (int64_t rows : {1, 3, 4, 7, 33})
            for (int64_t columns : {40, 128, 300}) {
                Draw draw;
                Matrix w{layout, 1, 50, columns, nullptr};
                std::vector<uint8_t> data(w.nbytes() + 4096);
                for (uint8_t& byte : data) byte = static_cast<uint8_t>(draw.bits());
                for (int64_t t = 0; w.tiled() && t < 4; ++t) {
                    uint16_t* scales = reinterpret_cast<uint16_t*>(data.data() + t * w.tile_bytes() + w.weight_bytes());
                    for (int64_t i = 0; i < w.groups() * kTileRows; ++i) scales[i] = static_cast<uint16_t>(draw.bits() % 0x3c00);
                }
                for (int64_t i = 0; !w.tiled() && i < w.rows * columns; ++i) {
                    const float value = draw.real();
                    if (layout == Layout::f32_rows) std::memcpy(data.data() + 4 * i, &value, 4);
                    const uint16_t half = to_bfloat16(value);
                    if (layout == Layout::bf16_rows) std::memcpy(data.data() + 2 * i, &half, 2);
                }
                w.data = data.data();
                std::vector<float> x(rows * columns), out(rows * w.rows);
                for (float& v : x) v = draw.real();
                linear(context, w, nullptr, x.data(), rows, nullptr, out.data());
                uint32_t all = 0;
                for (float v : out) all = all * 31 + as_bits(v);
                std::printf("layout %d, %d rows, %d columns: %08x, the first %a\n", static_cast<int>(layout),
                            static_cast<int>(rows), static_cast<int>(columns), all, static_cast<double>(out[0]));
            }
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = 3.7f * static_cast<float>(i - 8);
    store(values, exp(load(values)));
    for (float v : values) std::printf("%a\n", static_cast<double>(v));
}
