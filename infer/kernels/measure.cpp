// What calibration observes, and what this machine can reach at most.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>

#include "kernels.h"
#include "peaks.h"
#include "pool.h"

namespace quantbench {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int64_t Kernels::observe(ConstFloats x, int64_t rows, ConstVector limit, Array<float, 1> channel_absmax,
                         Array<double, 1> channel_sum, Array<float, 1> minimum, Array<float, 1> maximum,
                         Array<int64_t, 2> histogram) const {
    int64_t t = int64_t(x.shape(0)), channels = int64_t(x.shape(1));
    require(rows > 0 && channels % rows == 0, "rows must divide the channels");
    require(int64_t(limit.shape(0)) == rows && int64_t(minimum.shape(0)) == rows && int64_t(maximum.shape(0)) == rows &&
                int64_t(histogram.shape(0)) == rows && int64_t(histogram.shape(1)) == kBins, "one entry per row");
    require(int64_t(channel_absmax.shape(0)) == channels && int64_t(channel_sum.shape(0)) == channels, "one entry per channel");
    int64_t width = channels / rows, chunk = std::min<int64_t>(width, 512), per_row = (width + chunk - 1) / chunk;
    std::mutex merge;
    int64_t bad = t;
    Release release(t * channels);
    Pool::shared()->run(rows * per_row, [&](int64_t task) {
        int64_t row = task / per_row, first = row * width + task % per_row * chunk;
        std::vector<int64_t> counts(kBins, 0);
        float low = minimum.data()[row], high = maximum.data()[row];
        Observe o{x.data(), t, channels, 1, limit.data() + row, channel_absmax.data(), channel_sum.data(), &low, &high, counts.data()};
        int64_t seen = table_.observe(o, first, std::min(first + chunk, (row + 1) * width));
        std::lock_guard lock(merge);
        minimum.data()[row] = std::min(minimum.data()[row], low);
        maximum.data()[row] = std::max(maximum.data()[row], high);
        for (int64_t b = 0; b < kBins; ++b) histogram.data()[row * kBins + b] += counts[size_t(b)];
        if (seen >= 0) bad = std::min(bad, seen);
    });
    return bad == t ? -1 : bad;
}

// NaN or infinity in a row comes out as such.
void Kernels::absmax(ConstFloats x, int64_t rows, Array<float, 1> out) const {
    int64_t t = int64_t(x.shape(0)), channels = int64_t(x.shape(1));
    require(rows > 0 && channels % rows == 0 && int64_t(out.shape(0)) == rows, "rows must divide the channels");
    int64_t width = channels / rows, pieces = 8, piece = (t + pieces - 1) / pieces;
    std::vector<float> tops(size_t(rows * pieces), 0.0f);
    Release release(t * channels);
    Pool::shared()->run(rows * pieces, [&](int64_t i) {
        int64_t row = i / pieces, from = std::min(t, i % pieces * piece), to = std::min(t, from + piece);
        tops[size_t(i)] = table_.absmax(x.data() + from * channels, to - from, channels, row * width, (row + 1) * width);
    });
    for (int64_t i = 0; i < rows * pieces; ++i) {
        float& best = out.data()[i / pieces];
        if (i % pieces == 0) best = 0.0f;
        if (!std::isnan(best) && !(tops[size_t(i)] <= best)) best = tops[size_t(i)];
    }
}

double Kernels::read_gb_per_s(int64_t bytes, int rounds) const {
    int64_t count = bytes / 4, pieces = 64, piece = count / pieces;
    std::vector<float> data(size_t(count), 1.0f);
    nb::gil_scoped_release release;
    auto pool = Pool::shared();
    double best = 1e30;
    std::vector<double> sums(size_t(pieces), 0.0);
    for (int r = 0; r < rounds; ++r) {
        auto start = std::chrono::steady_clock::now();
        pool->run(pieces, [&](int64_t i) { sums[size_t(i)] += table_.read_all(data.data() + i * piece, piece); });
        best = std::min(best, seconds_since(start));
    }
    return double(pieces * piece) * 4 / best / 1e9;
}

double Kernels::gop_per_s(const std::string& kind, double seconds) const {
    require(kind == "float32" || kind == "int8" || kind == "bf16", "kind of products: float32, int8 or bf16");
    nb::gil_scoped_release release;
    auto pool = Pool::shared();
    auto peak = kind == "int8" ? table_.peak_int8 : table_.peak_float;
    if (auto own = peak_of(table_.name, kind)) peak = own;
    int64_t threads = pool->threads();
    std::vector<double> done(size_t(threads) * 16, 0.0);
    double best = 0;
    auto start = std::chrono::steady_clock::now();
    do {
        auto round = std::chrono::steady_clock::now();
        pool->run(threads, [&](int64_t i) { done[size_t(i * 16)] = peak(200000); });
        double total = 0;
        for (int64_t i = 0; i < threads; ++i) total += done[size_t(i * 16)];
        best = std::max(best, total / seconds_since(round) / 1e9);
    } while (seconds_since(start) < seconds);
    return best;
}

}  // namespace quantbench
