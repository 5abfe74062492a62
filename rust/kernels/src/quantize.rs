//! Numbers into the blocks of [`crate::quant`]: each type's best codes and scales, by least squares.
//!
//! The plain types and those of 32 numbers with one scale are as the `gguf` Python package makes them, bit for bit; NF4 and
//! FP4 as bitsandbytes does on a CPU. The others look for the scale (and minimum) whose rounded codes leave the least weighted square error.

use half::{bf16, f16};

use crate::quant::{
    E2M1_DOUBLED, FP4_VALUES, IQ4_VALUES, NF4_VALUES, TensorType, e8m0_half_to_f32, f16_to_f32,
};
use crate::simd::{Isa, Simd, dispatch};

/// Write `x` as blocks of `ty` to `out`. `importance`, as long as `x`, says how much an error of each number counts; none:
/// larger numbers count for more. It is of use to the types that search for their scales: K, IQ4.
///
/// # Panics
/// Where `x` is no whole number of blocks, `out` is not exactly as long as `x` asks, or `importance` not as long as `x`:
/// defects of the caller.
pub fn quantize(ty: TensorType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let wanted = ty.row_bytes(x.len());
    assert_eq!(
        Some(out.len()),
        wanted,
        "{} numbers of {}",
        x.len(),
        ty.name()
    );
    assert!(importance.is_none_or(|w| w.len() == x.len()));
    // SAFETY: `detect` gives what this CPU has.
    unsafe { quantize_for(Isa::detect(), ty, x, importance, out) };
}

dispatch! {
    unsafe fn quantize_for<>(ty: TensorType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) = quantize_body
}

/// Plain code that is compiled for each instruction set: its sums keep their order, so that its bits are everywhere the
/// same.
#[inline(always)]
unsafe fn quantize_body<S: Simd>(
    ty: TensorType,
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    match ty {
        TensorType::F32 => plain(x, out, |x: f32| x.to_le_bytes()),
        TensorType::F16 => plain(x, out, |x: f32| f16::from_f32(x).to_le_bytes()),
        TensorType::BF16 => plain(x, out, |x: f32| bf16::from_f32(x).to_le_bytes()),
        TensorType::Q4_0 => each(x, out, |x, b| symmetric_32::<18>(x, b, 8.0)),
        TensorType::Q5_0 => each(x, out, |x, b| symmetric_32::<22>(x, b, 16.0)),
        TensorType::Q4_1 => each(x, out, |x, b| affine_32::<20>(x, b, 15.0)),
        TensorType::Q5_1 => each(x, out, |x, b| affine_32::<24>(x, b, 31.0)),
        TensorType::Q8_0 => each(x, out, q8_0),
        TensorType::MXFP4 => each(x, out, mxfp4),
        TensorType::NF4 => each(x, out, |x, b| of_64(x, b, &NF4)),
        TensorType::FP4 => each(x, out, |x, b| of_64(x, b, &FP4)),
        TensorType::Q2_K => weighed(x, importance, out, q2_k),
        TensorType::Q3_K => weighed(x, importance, out, q3_k),
        TensorType::Q4_K => weighed(x, importance, out, q4_k),
        TensorType::Q5_K => weighed(x, importance, out, q5_k),
        TensorType::Q6_K => weighed(x, importance, out, q6_k),
        TensorType::IQ4_NL => weighed(x, importance, out, iq4_nl),
        TensorType::IQ4_XS => weighed(x, importance, out, iq4_xs),
    }
}

#[inline(always)]
fn plain<const B: usize>(x: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; B]) {
    for (x, out) in x.iter().zip(out.as_chunks_mut().0) {
        *out = bytes(*x);
    }
}

#[inline(always)]
fn each<const B: usize, const N: usize>(
    x: &[f32],
    out: &mut [u8],
    block: impl Fn(&[f32; N], &mut [u8; B]),
) {
    for (x, out) in x.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        out.fill(0);
        block(x, out);
    }
}

/// The same with weights. Numbers that are not finite count as zero.
#[inline(always)]
fn weighed<const B: usize, const N: usize>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    block: impl Fn(&[f32; N], &[f32; N], &mut [u8; B]),
) {
    let given = |i: usize| importance.map(|w| &w[i * N..][..N]);
    for (i, (x, out)) in x
        .as_chunks()
        .0
        .iter()
        .zip(out.as_chunks_mut().0)
        .enumerate()
    {
        out.fill(0);
        let x = x.map(|x: f32| if x.is_finite() { x } else { 0.0 });
        block(&x, &weights(&x, given(i)), out);
    }
}

/// How much an error of each number counts.
#[inline(always)]
fn weights<const N: usize>(x: &[f32; N], given: Option<&[f32]>) -> [f32; N] {
    let mut squares = [0.0; 16];
    for x in x.as_chunks::<16>().0 {
        for (square, x) in squares.iter_mut().zip(x) {
            *square += x * x;
        }
    }
    let square = squares.iter().sum::<f32>() / N as f32;
    let root = square.sqrt();
    let mut w = [0.0; N];
    for (i, w) in w.iter_mut().enumerate() {
        *w = match given {
            Some(given) => given[i].max(0.0) * (2.0 * square + x[i] * x[i]).sqrt(),
            None => root + x[i].abs(),
        };
    }
    w
}

/// To the nearest whole number, of two the even one: exact below 2^22, and what compilers make vectors of.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// From here on numbers are whole.
const MAGIC: f32 = 12_582_912.0;

/// From `low` to `high`; NaN is taken for `low`. What compilers make two instructions of.
#[inline(always)]
fn clamped(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

#[inline(always)]
fn put_f16(b: &mut [u8], at: usize, x: f32) -> f32 {
    let bits = f16::from_f32(x).to_bits();
    b[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    f16_to_f32(bits)
}

#[inline(always)]
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Set code `i` of 32 nibbles.
#[inline(always)]
fn put_nibble(b: &mut [u8], i: usize, code: u8) {
    b[i % 16] |= (code & 15) << (4 * (i / 16));
}

/// Nibbles and, where the block has them, fifth bits before these.
#[inline(always)]
fn put_codes(b: &mut [u8], codes: impl Iterator<Item = u8>) {
    let high = b.len() - 16;
    for (i, code) in codes.enumerate() {
        put_nibble(&mut b[high..], i, code);
        if high > 0 {
            b[i / 8] |= (code >> 4) << (i % 8);
        }
    }
}

// Blocks of 32, as the gguf package makes them

#[inline(always)]
fn symmetric_32<const B: usize>(x: &[f32; 32], b: &mut [u8; B], half: f32) {
    let far = x
        .iter()
        .fold(0.0f32, |far, x| if x.abs() > far.abs() { *x } else { far });
    let d = far / -half;
    let id = inverse(d);
    put_f16(b, 0, d);
    let top = 2.0 * half - 1.0;
    put_codes(
        &mut b[2..],
        x.iter()
            .map(|x| (x * id + (half + 0.5)).clamp(0.0, top) as u8),
    );
}

#[inline(always)]
fn affine_32<const B: usize>(x: &[f32; 32], b: &mut [u8; B], levels: f32) {
    let (low, high) = bounds(x);
    let d = (high - low) / levels;
    let id = inverse(d);
    put_f16(b, 0, d);
    put_f16(b, 2, low);
    let code = |x: &f32| ((x - low) * id + 0.5).clamp(0.0, levels) as u8;
    put_codes(&mut b[4..], x.iter().map(code));
}

#[inline(always)]
fn bounds(x: &[f32]) -> (f32, f32) {
    let least = x.iter().fold(f32::INFINITY, |a, b| a.min(*b));
    let most = x.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    (least, most)
}

#[inline(always)]
fn q8_0(x: &[f32; 32], b: &mut [u8; 34]) {
    let far = x.iter().fold(0.0f32, |far, x| far.max(x.abs()));
    let d = far / 127.0;
    let id = inverse(d);
    put_f16(b, 0, d);
    for (x, b) in x.iter().zip(&mut b[2..]) {
        *b = (x * id).round() as i8 as u8;
    }
}

/// The scale is the power of two two below the largest number's.
#[inline(always)]
fn mxfp4(x: &[f32; 32], b: &mut [u8; 17]) {
    let far = x.iter().fold(0.0f32, |far, x| far.max(x.abs()));
    let e = match far > 0.0 {
        true => (far.log2().floor() - 2.0 + 127.0).clamp(0.0, 254.0) as u8,
        false => 0,
    };
    b[0] = e;
    let d = e8m0_half_to_f32(e);
    for (i, x) in x.iter().enumerate() {
        let error = |code: &usize| (d * f32::from(E2M1_DOUBLED[*code]) - x).abs();
        let best = (0..16).min_by(|a, b| error(a).total_cmp(&error(b)));
        put_nibble(&mut b[1..], i, best.unwrap_or(0) as u8);
    }
}

// Blocks of 64, as bitsandbytes makes them

/// The values of 16 codes in order.
struct Nearest {
    /// The middles between neighbours: what is above one is taken for the larger.
    edges: [f32; 15],
    /// The values' codes.
    codes: [u8; 16],
}

static NF4: Nearest = Nearest::of(&NF4_VALUES);
static FP4: Nearest = Nearest::of(&FP4_VALUES);

impl Nearest {
    const fn of(values: &[f32; 16]) -> Self {
        let mut codes = [0; 16];
        let mut i = 0;
        while i < 16 {
            // Sorted in. FP4 has two codes for zero: the second one is what small positive numbers get.
            let mut at = i;
            while at > 0 && values[codes[at - 1] as usize] > values[i] {
                codes[at] = codes[at - 1];
                at -= 1;
            }
            codes[at] = i as u8;
            i += 1;
        }
        let mut edges = [0.0; 15];
        i = 0;
        while i < 15 {
            edges[i] = (values[codes[i] as usize] + values[codes[i + 1] as usize]) / 2.0;
            i += 1;
        }
        Self { edges, codes }
    }

    /// The code of a number from -1 to 1.
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        let above = |edge: &f32| u8::from(x > *edge);
        let rank = self.edges.iter().map(above).sum::<u8>();
        self.codes[usize::from(rank & 15)]
    }
}

#[inline(always)]
fn of_64(x: &[f32; 64], b: &mut [u8; 36], nearest: &Nearest) {
    let most = x.iter().fold(0.0f32, |most, x| {
        let x = x.abs();
        if x > most || x.is_nan() { x } else { most }
    });
    b[..4].copy_from_slice(&most.to_le_bytes());
    let inverse = 1.0 / most.max(1e-38);
    for (x, b) in x.as_chunks::<2>().0.iter().zip(&mut b[4..]) {
        let [first, second] = x.map(|x| nearest.code((x * inverse).clamp(-1.0, 1.0)));
        *b = first << 4 | second;
    }
}

/// What bitsandbytes' double quantisation makes of blocks' largest numbers: their mean taken off, 256 at a time to shares of
/// the largest in codes of 8 bits, and back.
pub fn nest(maxima: &mut [f32]) {
    let mean = sum_as_torch(maxima) / maxima.len().max(1) as f32;
    let values = dynamic_values();
    for block in maxima.chunks_mut(256) {
        let far = block
            .iter()
            .fold(0.0f32, |far, x| far.max((x - mean).abs()));
        for x in block {
            // It looks for the code at one of 65,536 places.
            let place = ((*x - mean) / far + 1.0) * 32_767.5 + 0.5;
            let share = place.floor().clamp(0.0, 65_535.0) / 32_767.5 - 1.0;
            let above = values.partition_point(|value| *value <= share);
            let (low, high) = (above.saturating_sub(1), above.min(255));
            let off = |code: usize| (share - values[code]).abs();
            let code = if off(high) < off(low) { high } else { low };
            *x = values[code] * far + mean;
        }
    }
}

/// The values of 8-bit codes with a dynamic exponent (Dettmers, 8-bit approximations, 2016), in order: in each of seven
/// decades twice as many fractions as in the one before, either sign; 0 and 1.
fn dynamic_values() -> [f32; 256] {
    let mut values = [0.0; 256];
    values[255] = 1.0;
    let mut at = 0;
    for i in 0..7 {
        let count = 1usize << i;
        let step = (1.0f32 - 0.1) / count as f32;
        // As torch spaces numbers evenly: the second half is counted from the end.
        let edge = |j: usize| match 2 * j < count + 1 {
            true => step.mul_add(j as f32, 0.1),
            false => step.mul_add(-((count - j) as f32), 1.0),
        };
        let decade = 10f64.powi(i - 6) as f32;
        for j in 0..count {
            let value = decade * ((edge(j) + edge(j + 1)) / 2.0);
            (values[at], values[at + 1]) = (value, -value);
            at += 2;
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// The sum of numbers in the order in which torch's CPU kernel adds them on one thread: four vectors of eight lanes side
/// by side, in a cascade of four levels. It shows in the last bit of the mean.
fn sum_as_torch(x: &[f32]) -> f32 {
    type Four = [[f32; 8]; 4];
    let add = |a: &mut Four, b: &Four| {
        for (a, b) in a.as_flattened_mut().iter_mut().zip(b.as_flattened()) {
            *a += b;
        }
    };
    let (vectors, rest) = x.as_chunks::<8>();
    let (rows, last) = vectors.as_chunks::<4>();
    let bits = usize::BITS - rows.len().saturating_sub(1).leading_zeros();
    let power = 4.max(bits / 4);
    let step = 1usize << power;
    let mut levels = [[[0.0f32; 8]; 4]; 4];
    let whole = rows.len() / step * step;
    for (i, row) in rows[..whole].iter().enumerate() {
        add(&mut levels[0], row);
        if !(i + 1).is_multiple_of(step) {
            continue;
        }
        for level in 1..4 {
            let below = std::mem::take(&mut levels[level - 1]);
            add(&mut levels[level], &below);
            if (i + 1) & ((step - 1) << (level as u32 * power)) != 0 {
                break;
            }
        }
    }
    for row in &rows[whole..] {
        add(&mut levels[0], row);
    }
    let [mut first, others @ ..] = levels;
    others.iter().for_each(|level| add(&mut first, level));
    let [mut lanes, more @ ..] = first;
    for vector in last.iter().chain(&more) {
        lanes.iter_mut().zip(vector).for_each(|(a, b)| *a += b);
    }
    rest.iter().chain(&lanes).sum()
}

// Searches. Sub-blocks lie side by side, as the lanes of vectors: `[i][j]` is number `i` of sub-block `j`. Each lane's sums
// keep their order, whatever the instruction set.

/// Numbers of `J` sub-blocks side by side.
#[inline(always)]
fn lanes<const J: usize, const N: usize>(x: &[f32; 256]) -> [[f32; J]; N] {
    let mut out = [[0.0; J]; N];
    for (j, x) in x.as_chunks::<N>().0.iter().enumerate() {
        for (out, x) in out.iter_mut().zip(x) {
            out[j] = *x;
        }
    }
    out
}

/// `x` as `scale * code - less` with codes of 0 to `levels` and `less` of at least 0: the pairs that leave the least weighted
/// square error. For every one of some widths around the plain one, codes are rounded and the best pair for these codes
/// follows from the normal equations.
#[inline(always)]
fn fit_affine<const J: usize, const N: usize>(
    x: &[[f32; J]; N],
    w: &[[f32; J]; N],
    levels: f32,
) -> ([f32; J], [f32; J]) {
    let (mut low, mut high) = ([0.0f32; J], [f32::NEG_INFINITY; J]);
    let (mut sw, mut sx, mut sxx) = ([0.0f32; J], [0.0f32; J], [0.0f32; J]);
    for (x, w) in x.iter().zip(w) {
        for j in 0..J {
            low[j] = low[j].min(x[j]);
            high[j] = high[j].max(x[j]);
            sw[j] += w[j];
            sx[j] += w[j] * x[j];
            sxx[j] += w[j] * x[j] * x[j];
        }
    }
    let range: [f32; J] = std::array::from_fn(|j| high[j] - low[j]);
    let mut scales = range.map(|range| range / levels);
    let mut less = low.map(|low| -low);
    let mut least = [f64::INFINITY; J];
    for step in 0..=12 {
        let levels_here = levels + 0.15 * (step - 6) as f32;
        let width = range.map(|range| levels_here / range);
        let (mut sq, mut sqq, mut sxq) = ([0.0f32; J], [0.0f32; J], [0.0f32; J]);
        for (x, w) in x.iter().zip(w) {
            for j in 0..J {
                let q = clamped(round(width[j] * (x[j] - low[j])), 0.0, levels);
                let wq = w[j] * q;
                sq[j] += wq;
                sqq[j] += wq * q;
                sxq[j] += wq * x[j];
            }
        }
        for j in 0..J {
            let (sw, sx, sxx) = (f64::from(sw[j]), f64::from(sx[j]), f64::from(sxx[j]));
            let (sq, sqq, sxq) = (f64::from(sq[j]), f64::from(sqq[j]), f64::from(sxq[j]));
            let of = sw * sqq - sq * sq;
            let both = ((sw * sxq - sx * sq) / of, (sq * sxq - sqq * sx) / of);
            let (scale, offset) = if both.1 < 0.0 { (sxq / sqq, 0.0) } else { both };
            let error = scale * scale * sqq + offset * offset * sw - 2.0 * scale * offset * sq
                + sxx
                - 2.0 * scale * sxq
                + 2.0 * offset * sx;
            let better = of > 0.0 && scale > 0.0 && error < least[j];
            least[j] = if better { error } else { least[j] };
            scales[j] = if better { scale as f32 } else { scales[j] };
            less[j] = if better { offset as f32 } else { less[j] };
        }
    }
    for j in 0..J {
        if range[j] <= 0.0 {
            (scales[j], less[j]) = (0.0, -low[j]);
        }
    }
    (scales, less)
}

/// `x` as `scale * code` with codes of `-half` to `half - 1`: the scales, of either sign, that leave the least weighted square
/// error.
#[inline(always)]
fn fit_symmetric<const J: usize, const N: usize>(
    x: &[[f32; J]; N],
    w: &[[f32; J]; N],
    half: f32,
) -> [f32; J] {
    let far = furthest_of(x);
    let mut scales = far.map(|far| far / -half);
    let mut most = [0.0f32; J];
    for step in -9..=9 {
        let id = far.map(|far| -(half + 0.1 * step as f32) / far);
        let (mut sxq, mut sqq) = ([0.0f32; J], [0.0f32; J]);
        for (x, w) in x.iter().zip(w) {
            for j in 0..J {
                let q = clamped(round(id[j] * x[j]), -half, half - 1.0);
                let wq = w[j] * q;
                sxq[j] += wq * x[j];
                sqq[j] += wq * q;
            }
        }
        better(&sxq, &sqq, &mut most, &mut scales);
    }
    for j in 0..J {
        scales[j] = if far[j] == 0.0 { 0.0 } else { scales[j] };
    }
    scales
}

/// Keep the best scale for these codes where it takes more off the error than those before.
#[inline(always)]
fn better<const J: usize>(
    sxq: &[f32; J],
    sqq: &[f32; J],
    most: &mut [f32; J],
    scales: &mut [f32; J],
) {
    for j in 0..J {
        let better = sqq[j] > 0.0 && sxq[j] * sxq[j] > most[j] * sqq[j];
        most[j] = if better {
            sxq[j] * sxq[j] / sqq[j]
        } else {
            most[j]
        };
        scales[j] = if better { sxq[j] / sqq[j] } else { scales[j] };
    }
}

/// Of each lane the number furthest from zero.
#[inline(always)]
fn furthest_of<const J: usize>(x: &[[f32; J]]) -> [f32; J] {
    let mut far = [0.0f32; J];
    for x in x {
        for j in 0..J {
            far[j] = if x[j].abs() > far[j].abs() {
                x[j]
            } else {
                far[j]
            };
        }
    }
    far
}

/// Each of 16 codes' values times a scale: the scales that leave the least weighted square error.
#[inline(always)]
fn fit_table<const J: usize>(x: &[[f32; J]; 32], w: &[[f32; J]; 32]) -> [f32; J] {
    let far = furthest_of(x);
    let first = f32::from(IQ4_VALUES[0]);
    let mut scales = far.map(|far| far / first);
    let mut most = [0.0f32; J];
    for step in -7..=7 {
        let id = far.map(|far| (first + step as f32) / far);
        let (mut sxq, mut sqq) = ([0.0f32; J], [0.0f32; J]);
        for (x, w) in x.iter().zip(w) {
            for j in 0..J {
                let q = nearest_value(id[j] * x[j]);
                let wq = w[j] * q;
                sxq[j] += wq * x[j];
                sqq[j] += wq * q;
            }
        }
        better(&sxq, &sqq, &mut most, &mut scales);
    }
    for j in 0..J {
        scales[j] = if far[j] == 0.0 { 0.0 } else { scales[j] };
    }
    scales
}

/// Where the nearest value of IQ4 changes to the next one.
const IQ4_EDGES: [f32; 15] = {
    let mut edges = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        edges[i] = (IQ4_VALUES[i] as f32 + IQ4_VALUES[i + 1] as f32) / 2.0;
        i += 1;
    }
    edges
};

/// The value of IQ4 that is nearest.
#[inline(always)]
fn nearest_value(x: f32) -> f32 {
    let mut value = f32::from(IQ4_VALUES[0]);
    for (i, edge) in IQ4_EDGES.iter().enumerate() {
        let more = f32::from(IQ4_VALUES[i + 1]) - f32::from(IQ4_VALUES[i]);
        value += if x > *edge { more } else { 0.0 };
    }
    value
}

/// Its code.
#[inline(always)]
fn nearest(x: f32) -> u8 {
    IQ4_EDGES.iter().map(|edge| u8::from(x > *edge)).sum()
}

/// The one furthest from zero.
#[inline(always)]
fn furthest(x: &[f32]) -> f32 {
    x.iter()
        .fold(0.0, |far, x| if x.abs() > far.abs() { *x } else { far })
}

// Blocks of 256

/// Each sub-block's scale and minimum in steps of a block's factors, and codes.
struct Affine<const J: usize> {
    scales: [u8; J],
    minima: [u8; J],
    codes: [u8; 256],
}

/// Fit `J` sub-blocks of `N` numbers with scales and minima of at most `steps`; `put` stores a factor at a place.
#[inline(always)]
fn affine<const J: usize, const N: usize>(
    x: &[f32; 256],
    w: &[f32; 256],
    (levels, steps): (f32, f32),
    mut put: impl FnMut(usize, f32) -> f32,
) -> Affine<J> {
    let (scales, minima) = fit_affine::<J, N>(&lanes(x), &lanes(w), levels);
    let most = |all: &[f32; J]| all.iter().fold(0.0f32, |a, b| a.max(*b));
    let (d, less) = (put(0, most(&scales) / steps), put(1, most(&minima) / steps));
    let (id, iless) = (inverse(d), inverse(less));
    let mut out = Affine {
        scales: scales.map(|scale| whole(scale * id, 0.0, steps)),
        minima: minima.map(|minimum| whole(minimum * iless, 0.0, steps)),
        codes: [0; 256],
    };
    for (j, (x, codes)) in x
        .chunks_exact(N)
        .zip(out.codes.chunks_exact_mut(N))
        .enumerate()
    {
        let id = inverse(d * f32::from(out.scales[j]));
        let less = less * f32::from(out.minima[j]);
        for (x, code) in x.iter().zip(codes) {
            *code = whole((x + less) * id, 0.0, levels);
        }
    }
    out
}

/// The whole number from `low` to `high` that is nearest, as the last byte of it; NaN is taken for `low`.
#[inline(always)]
fn whole(x: f32, low: f32, high: f32) -> u8 {
    // The lowest bits of a number of this size count ones.
    (clamped(x, low, high) + MAGIC).to_bits() as u8
}

/// Two-bit codes, as `two_bits` reads them.
#[inline(always)]
fn put_two_bits(b: &mut [u8], code: impl Fn(usize) -> u8) {
    for (n, b) in b.chunks_exact_mut(32).enumerate() {
        for (l, b) in b.iter_mut().enumerate() {
            let of = |s: usize| (code(128 * n + 32 * s + l) & 3) << (2 * s);
            *b = of(0) | of(1) | of(2) | of(3);
        }
    }
}

/// Nibbles: of each `2 * half` codes the first half beside the second.
#[inline(always)]
fn put_halves(b: &mut [u8], half: usize, codes: &[u8; 256]) {
    for (b, codes) in b.chunks_exact_mut(half).zip(codes.chunks_exact(2 * half)) {
        let (low, high) = codes.split_at(half);
        for ((b, low), high) in b.iter_mut().zip(low).zip(high) {
            *b = low & 15 | high << 4;
        }
    }
}

/// Bit `at` of each code: 32 bytes, a bit for each 32 codes.
#[inline(always)]
fn put_bits(b: &mut [u8], at: u32, codes: &[u8; 256]) {
    for (j, codes) in codes.chunks_exact(32).enumerate() {
        for (b, code) in b.iter_mut().zip(codes) {
            *b |= (code >> at & 1) << j;
        }
    }
}

/// Eight six-bit scales and minima in 12 bytes, as `k_scale_min` reads them.
fn put_k_scales(b: &mut [u8], scales: &[u8; 8], minima: &[u8; 8]) {
    for j in 0..4 {
        b[j] = scales[j] | scales[j + 4] >> 4 << 6;
        b[j + 4] = minima[j] | minima[j + 4] >> 4 << 6;
        b[j + 8] = scales[j + 4] & 15 | minima[j + 4] << 4;
    }
}

#[inline(always)]
fn q2_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 84]) {
    let fit = affine::<16, 16>(x, w, (3.0, 15.0), |at, d| put_f16(b, 80 + 2 * at, d));
    let steps = fit.scales.iter().zip(fit.minima);
    for (b, (scale, minimum)) in b.iter_mut().zip(steps) {
        *b = scale | minimum << 4;
    }
    put_two_bits(&mut b[16..80], |i| fit.codes[i]);
}

#[inline(always)]
fn q4_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 144]) {
    let fit = affine::<8, 32>(x, w, (15.0, 63.0), |at, d| put_f16(b, 2 * at, d));
    put_k_scales(&mut b[4..], &fit.scales, &fit.minima);
    put_halves(&mut b[16..], 32, &fit.codes);
}

#[inline(always)]
fn q5_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 176]) {
    let fit = affine::<8, 32>(x, w, (31.0, 63.0), |at, d| put_f16(b, 2 * at, d));
    put_k_scales(&mut b[4..], &fit.scales, &fit.minima);
    put_bits(&mut b[16..48], 4, &fit.codes);
    put_halves(&mut b[48..], 32, &fit.codes);
}

/// Scales of sub-blocks as whole numbers of `-steps` to `steps - 1` times a factor, and the factor as it is to be stored.
#[inline(always)]
fn whole_scales<const J: usize>(scales: &[f32; J], steps: f32) -> ([i8; J], f32) {
    let d = furthest(scales) / -steps;
    let id = inverse(f16_to_f32(f16::from_f32(d).to_bits()));
    let whole = scales.map(|s| whole(s * id, -steps, steps - 1.0) as i8);
    (whole, d)
}

/// Codes of sub-blocks of 16 with these scales, from `-half` to `half - 1`, and `half` more than that.
#[inline(always)]
fn symmetric_codes(x: &[f32; 256], scales: &[i8; 16], d: f32, half: f32) -> [u8; 256] {
    let mut codes = [0; 256];
    let blocks = x.chunks_exact(16).zip(codes.chunks_exact_mut(16));
    for ((x, codes), scale) in blocks.zip(scales) {
        let id = inverse(d * f32::from(*scale));
        for (x, code) in x.iter().zip(codes) {
            *code = whole(x * id, -half, half - 1.0).wrapping_add(half as u8);
        }
    }
    codes
}

#[inline(always)]
fn q3_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 110]) {
    let scales = fit_symmetric::<16, 16>(&lanes(x), &lanes(w), 4.0);
    let (scales, d) = whole_scales(&scales, 32.0);
    let d = put_f16(b, 108, d);
    for (j, scale) in scales.into_iter().enumerate() {
        let bits = (scale + 32) as u8;
        b[96 + j % 8] |= (bits & 15) << (4 * (j / 8));
        b[104 + j % 4] |= (bits >> 4) << (2 * (j / 4));
    }
    let codes = symmetric_codes(x, &scales, d, 4.0);
    put_bits(&mut b[..32], 2, &codes);
    put_two_bits(&mut b[32..96], |i| codes[i]);
}

#[inline(always)]
fn q6_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 210]) {
    let scales = fit_symmetric::<16, 16>(&lanes(x), &lanes(w), 32.0);
    let (scales, d) = whole_scales(&scales, 128.0);
    let d = put_f16(b, 208, d);
    for (b, scale) in b[192..208].iter_mut().zip(scales) {
        *b = scale as u8;
    }
    let codes = symmetric_codes(x, &scales, d, 32.0);
    put_halves(&mut b[..128], 64, &codes);
    put_two_bits(&mut b[128..192], |i| codes[i] >> 4);
}

#[inline(always)]
fn iq4_nl(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 18]) {
    let [scale] = fit_table(&x.map(|x| [x]), &w.map(|w| [w]));
    let d = put_f16(b, 0, scale);
    put_table(x, d, &mut b[2..]);
}

#[inline(always)]
fn put_table(x: &[f32], d: f32, b: &mut [u8]) {
    let id = inverse(d);
    let (low, high) = x.split_at(x.len() / 2);
    for ((low, high), b) in low.iter().zip(high).zip(b) {
        *b = nearest(low * id) | nearest(high * id) << 4;
    }
}

#[inline(always)]
fn iq4_xs(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 136]) {
    let scales = fit_table::<8>(&lanes(x), &lanes(w));
    let (scales, d) = whole_scales(&scales, 32.0);
    let d = put_f16(b, 0, d);
    let mut high = 0u16;
    for (j, (scale, x)) in scales.into_iter().zip(x.as_chunks::<32>().0).enumerate() {
        let bits = (scale + 32) as u8;
        b[4 + j / 2] |= (bits & 15) << (4 * (j % 2));
        high |= u16::from(bits >> 4) << (2 * j);
        put_table(x, d * f32::from(scale), &mut b[8 + 16 * j..][..16]);
    }
    b[2..4].copy_from_slice(&high.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::dequantize;

    struct Random(u64);
    impl Random {
        fn next(&mut self) -> f32 {
            self.0 = self
                .0
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (self.0 >> 33) as f32 / (1u64 << 31) as f32
        }
        /// Nearly normal.
        fn normal(&mut self) -> f32 {
            (0..12).map(|_| self.next()).sum::<f32>() - 6.0
        }
    }

    fn there_and_back(ty: TensorType, x: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
        let mut blocks = vec![0xAA; ty.row_bytes(x.len()).unwrap()];
        quantize(ty, x, importance, &mut blocks);
        let mut out = vec![0.0; x.len()];
        dequantize(ty, &blocks, &mut out);
        out
    }

    fn relative_error(x: &[f32], y: &[f32], w: impl Fn(usize) -> f32) -> f32 {
        let pairs = || x.iter().zip(y).enumerate();
        let off: f32 = pairs().map(|(i, (x, y))| w(i) * (x - y).powi(2)).sum();
        let all: f32 = pairs().map(|(i, (x, _))| w(i) * x * x).sum();
        (off / all).sqrt()
    }

    #[test]
    fn each_type_loses_no_more_than_its_bits_make_it() {
        let mut random = Random(1);
        let x: Vec<f32> = (0..256 * 64).map(|_| 0.02 * random.normal()).collect();
        let most = [
            (TensorType::F32, 0.0),
            (TensorType::F16, 3e-4),
            (TensorType::BF16, 2e-3),
            (TensorType::Q8_0, 0.006),
            (TensorType::Q6_K, 0.019),
            (TensorType::Q5_K, 0.038),
            (TensorType::Q5_1, 0.041),
            (TensorType::Q5_0, 0.047),
            (TensorType::Q4_K, 0.076),
            (TensorType::IQ4_XS, 0.076),
            (TensorType::IQ4_NL, 0.074),
            (TensorType::Q4_1, 0.083),
            (TensorType::Q4_0, 0.092),
            (TensorType::NF4, 0.096),
            (TensorType::MXFP4, 0.13),
            (TensorType::FP4, 0.14),
            (TensorType::Q3_K, 0.17),
            (TensorType::Q2_K, 0.30),
        ];
        assert_eq!(most.len(), TensorType::ALL.len());
        for (ty, most) in most {
            let off = relative_error(&x, &there_and_back(ty, &x, None), |_| 1.0);
            assert!(off <= most, "{}: {off}", ty.name());
            assert!(
                off >= 0.5 * most,
                "{}: {off}, the bound says little",
                ty.name()
            );
        }
    }

    #[test]
    fn what_a_type_can_hold_is_held() {
        let mut random = Random(2);
        for ty in TensorType::ALL {
            assert_eq!(
                there_and_back(ty, &[0.0; 256], None),
                [0.0; 256],
                "{}",
                ty.name()
            );
            // Numbers of a block that was quantised come back as they are, or nearly.
            let x: Vec<f32> = (0..256).map(|_| random.normal()).collect();
            let once = there_and_back(ty, &x, None);
            let twice = there_and_back(ty, &once, None);
            let off = relative_error(&once, &twice, |_| 1.0);
            assert!(off < 0.03, "{}: {off}", ty.name());
        }
    }

    #[test]
    fn nf4_and_fp4_take_the_nearest_value() {
        for (values, nearest) in [(NF4_VALUES, &NF4), (FP4_VALUES, &FP4)] {
            let mut random = Random(9);
            for x in (0..100_000).map(|_| 2.0 * random.next() - 1.0) {
                let far = |value: f32| (x - value).abs();
                let least = values.iter().fold(f32::MAX, |least, v| least.min(far(*v)));
                let own = far(values[usize::from(nearest.code(x))]);
                assert!(own <= least + 1e-7, "{x}: {own} {least}");
            }
        }
        let mut blocks = [0xAA; 72];
        quantize(TensorType::NF4, &[0.0; 128], None, &mut blocks);
        assert_eq!((blocks[0], blocks[4], blocks[71]), (0, 0x77, 0x77));
        quantize(TensorType::FP4, &[0.0; 128], None, &mut blocks);
        assert_eq!(blocks, [0; 72]);
        // On either side of an edge: 1/12 is half of 2/12, which is a code's; between it and 0.0625/12 is the edge.
        let mut x = [0.0; 64];
        (x[0], x[1], x[2], x[3]) = (-1.0, 1e-6, -1e-6, 0.25);
        quantize(TensorType::FP4, &x, None, &mut blocks[..36]);
        assert_eq!(blocks[4..6], [0xB8, 0x07]);
    }

    /// The numbers of a bitsandbytes 0.50 run, on one thread.
    #[test]
    fn double_quantisation_keeps_maxima_near_and_its_code_is_the_dynamic_one() {
        let values = dynamic_values();
        assert_eq!(
            (values[0], values[127], values[255]),
            (-0.992_968_74, 0.0, 1.0)
        );
        assert!(values.is_sorted());
        let mut random = Random(11);
        let before: Vec<f32> = (0..5000).map(|_| 0.05 + 0.02 * random.next()).collect();
        let mut after = before.clone();
        nest(&mut after);
        let off = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) < 2e-4);
        assert_ne!(before, after);
        nest(&mut []);
    }

    #[test]
    fn hostile_numbers_make_finite_blocks_where_scales_are_sought() {
        let mut x = vec![1.0; 256];
        (x[3], x[70], x[200]) = (f32::NAN, f32::INFINITY, f32::MIN);
        for ty in [
            TensorType::Q2_K,
            TensorType::Q4_K,
            TensorType::Q6_K,
            TensorType::IQ4_XS,
        ] {
            there_and_back(ty, &x, None);
        }
        x[200] = 7.0;
        for ty in [
            TensorType::Q2_K,
            TensorType::Q4_K,
            TensorType::Q6_K,
            TensorType::IQ4_XS,
        ] {
            let y = there_and_back(ty, &x, None);
            assert!(y.iter().all(|y| y.is_finite()), "{}", ty.name());
        }
    }

    #[test]
    fn what_is_important_is_more_exact() {
        let mut random = Random(3);
        let x: Vec<f32> = (0..256 * 32).map(|_| random.normal()).collect();
        let important = |i: usize| if i.is_multiple_of(8) { 100.0 } else { 0.1 };
        let w: Vec<f32> = (0..x.len()).map(important).collect();
        for ty in [
            TensorType::Q2_K,
            TensorType::Q3_K,
            TensorType::Q4_K,
            TensorType::IQ4_NL,
        ] {
            let plain = relative_error(&x, &there_and_back(ty, &x, None), important);
            let weighed = relative_error(&x, &there_and_back(ty, &x, Some(&w)), important);
            assert!(weighed < 0.97 * plain, "{}: {weighed} {plain}", ty.name());
        }
    }
}
