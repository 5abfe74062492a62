//! Numbers into the blocks of [`crate::quant`]: each type's best codes and scales, by least squares.
//!
//! The plain types and those of 32 numbers with one scale are as the `gguf` Python package makes them, bit for bit; NF4 and
//! FP4 as bitsandbytes does on a CPU. The others look for the scale (and minimum) whose rounded codes leave the least weighted square error.

use half::{bf16, f16};

use crate::quant::{
    E2M1_DOUBLED, FP4_VALUES, IQ4_VALUES, NF4_VALUES, TensorType, e8m0_half_to_f32, f16_to_f32,
};

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

fn plain<const B: usize>(x: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; B]) {
    for (x, out) in x.iter().zip(out.as_chunks_mut().0) {
        *out = bytes(*x);
    }
}

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
fn weights<const N: usize>(x: &[f32; N], given: Option<&[f32]>) -> [f32; N] {
    let square = x.iter().map(|x| x * x).sum::<f32>() / N as f32;
    let mut w = [0.0; N];
    for (i, w) in w.iter_mut().enumerate() {
        *w = match given {
            Some(given) => given[i].max(0.0) * (2.0 * square + x[i] * x[i]).sqrt(),
            None => square.sqrt() + x[i].abs(),
        };
    }
    w
}

/// To the nearest whole number, of two the even one: exact below 2^22, and what compilers make vectors of.
#[inline(always)]
fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

fn put_f16(b: &mut [u8], at: usize, x: f32) -> f32 {
    let bits = f16::from_f32(x).to_bits();
    b[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    f16_to_f32(bits)
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Set code `i` of 32 nibbles.
fn put_nibble(b: &mut [u8], i: usize, code: u8) {
    b[i % 16] |= (code & 15) << (4 * (i / 16));
}

/// Nibbles and, where the block has them, fifth bits before these.
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

fn affine_32<const B: usize>(x: &[f32; 32], b: &mut [u8; B], levels: f32) {
    let (low, high) = bounds(x);
    let d = (high - low) / levels;
    let id = inverse(d);
    put_f16(b, 0, d);
    put_f16(b, 2, low);
    let code = |x: &f32| ((x - low) * id + 0.5).clamp(0.0, levels) as u8;
    put_codes(&mut b[4..], x.iter().map(code));
}

fn bounds(x: &[f32]) -> (f32, f32) {
    let least = x.iter().fold(f32::INFINITY, |a, b| a.min(*b));
    let most = x.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    (least, most)
}

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
    /// The largest number that is still taken for a value and not for the next larger one.
    edges: [f32; 15],
    /// The values' codes.
    codes: [u8; 16],
}

static NF4: Nearest = Nearest::of(&NF4_VALUES);
static FP4: Nearest = Nearest::of(&FP4_VALUES);

impl Nearest {
    /// The nearest value is taken, of two, as f32 tells the distances, the one with the smaller code.
    const fn of(values: &[f32; 16]) -> Self {
        let mut codes = [0; 16];
        let mut i = 0;
        while i < 16 {
            let mut code = 0;
            while values[code] != values[i] {
                code += 1;
            }
            let mut at = i;
            while at > 0 && values[codes[at - 1] as usize] > values[i] {
                codes[at] = codes[at - 1];
                at -= 1;
            }
            codes[at] = code as u8;
            i += 1;
        }
        let mut edges = [0.0; 15];
        i = 0;
        while i < 15 {
            edges[i] = edge(values, codes[i] as usize, codes[i + 1] as usize);
            i += 1;
        }
        Self { edges, codes }
    }

    /// The code of a number from -1 to 1; NaN is taken for the first, as all are equally far.
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        let rank = self
            .edges
            .iter()
            .map(|edge| u8::from(x > *edge))
            .sum::<u8>();
        match x.is_nan() {
            true => 0,
            false => self.codes[usize::from(rank & 15)],
        }
    }
}

/// Between two values, the one of the code `low` not above the other: the largest number that is taken for the first.
const fn edge(values: &[f32; 16], low: usize, high: usize) -> f32 {
    let (a, b) = (values[low], values[high]);
    let (mut first, mut last) = (a, b);
    // Halved until no number lies between.
    loop {
        let middle = first + (last - first) * 0.5;
        if middle <= first || middle >= last {
            return first;
        }
        let (below, above) = (middle - a, b - middle);
        if below < above || (below == above && low < high) {
            first = middle;
        } else {
            last = middle;
        }
    }
}

fn of_64(x: &[f32; 64], b: &mut [u8; 36], nearest: &Nearest) {
    let most = x.iter().fold(0.0f32, |most, x| {
        let x = x.abs();
        if x > most || x.is_nan() { x } else { most }
    });
    b[..4].copy_from_slice(&most.to_le_bytes());
    let inverse = 1.0 / most;
    for (x, b) in x.as_chunks::<2>().0.iter().zip(&mut b[4..]) {
        let [first, second] = x.map(|x| nearest.code((x * inverse).clamp(-1.0, 1.0)));
        *b = first << 4 | second;
    }
}

// Searches

/// `x` as `scale * code - less` with codes of 0 to `levels` and `less` of at least 0: the pair that leaves the least weighted
/// square error. For every one of some widths around the plain one, codes are rounded and the best pair for these codes
/// follows from the normal equations.
fn fit_affine<const N: usize>(x: &[f32], w: &[f32], levels: f32) -> (f32, f32) {
    let (Some(x), Some(w)) = (x.first_chunk::<N>(), w.first_chunk::<N>()) else {
        return (0.0, 0.0);
    };
    let (low, high) = bounds(x);
    let low = low.min(0.0);
    if high <= low {
        return (0.0, -low);
    }
    let (mut sw, mut sx, mut sxx) = (0.0f32, 0.0f32, 0.0f32);
    for (x, w) in x.iter().zip(w) {
        sw += w;
        sx += w * x;
        sxx += w * x * x;
    }
    if sw <= 0.0 {
        return ((high - low) / levels, -low);
    }
    let mut best = (f64::INFINITY, (high - low) / levels, -low);
    for step in 0..=12 {
        let width = (levels + 0.15 * (step - 6) as f32) / (high - low);
        let (mut sq, mut sqq, mut sxq) = (0.0f32, 0.0f32, 0.0f32);
        for (x, w) in x.iter().zip(w) {
            let q = round(width * (x - low)).clamp(0.0, levels);
            sq += w * q;
            sqq += w * q * q;
            sxq += w * x * q;
        }
        let (sw, sx, sxx) = (f64::from(sw), f64::from(sx), f64::from(sxx));
        let (sq, sqq, sxq) = (f64::from(sq), f64::from(sqq), f64::from(sxq));
        let of = sw * sqq - sq * sq;
        if of <= 0.0 {
            continue;
        }
        let mut scale = (sw * sxq - sx * sq) / of;
        let mut less = (sq * sxq - sqq * sx) / of;
        if less < 0.0 {
            (scale, less) = (sxq / sqq, 0.0);
        }
        let error = scale * scale * sqq + less * less * sw - 2.0 * scale * less * sq + sxx
            - 2.0 * scale * sxq
            + 2.0 * less * sx;
        if scale > 0.0 && error < best.0 {
            best = (error, scale as f32, less as f32);
        }
    }
    (best.1, best.2)
}

/// `x` as `scale * code` with codes of `-half` to `half - 1`: the scale, of either sign, that leaves the least weighted square
/// error.
fn fit_symmetric<const N: usize>(x: &[f32], w: &[f32], half: f32) -> f32 {
    let (Some(x), Some(w)) = (x.first_chunk::<N>(), w.first_chunk::<N>()) else {
        return 0.0;
    };
    let far = x
        .iter()
        .fold(0.0f32, |far, x| if x.abs() > far.abs() { *x } else { far });
    if far == 0.0 {
        return 0.0;
    }
    let mut best = (0.0f32, far / -half);
    for step in -9..=9 {
        let id = -(half + 0.1 * step as f32) / far;
        let (mut sxq, mut sqq) = (0.0f32, 0.0f32);
        for (x, w) in x.iter().zip(w) {
            let q = round(id * x).clamp(-half, half - 1.0);
            sxq += w * x * q;
            sqq += w * q * q;
        }
        // What the best scale for these codes takes off the error.
        if sqq > 0.0 && sxq * sxq > best.0 * sqq {
            best = (sxq * sxq / sqq, sxq / sqq);
        }
    }
    best.1
}

/// Each of 16 codes' values times a scale: the scale that leaves the least weighted square error.
fn fit_table(x: &[f32; 32], w: &[f32; 32]) -> f32 {
    let far = x
        .iter()
        .fold(0.0f32, |far, x| if x.abs() > far.abs() { *x } else { far });
    if far == 0.0 {
        return 0.0;
    }
    let first = f32::from(IQ4_VALUES[0]);
    let mut best = (0.0f32, far / first);
    for step in -7..=7 {
        let id = (first + step as f32) / far;
        let (mut sxq, mut sqq) = (0.0f32, 0.0f32);
        for (x, w) in x.iter().zip(w) {
            let q = f32::from(IQ4_VALUES[nearest(id * x)]);
            sxq += w * x * q;
            sqq += w * q * q;
        }
        if sqq > 0.0 && sxq * sxq > best.0 * sqq {
            best = (sxq * sxq / sqq, sxq / sqq);
        }
    }
    best.1
}

/// The code whose value is nearest.
fn nearest(x: f32) -> usize {
    let above = IQ4_VALUES.iter().filter(|v| f32::from(**v) <= x).count();
    let (low, high) = (above.saturating_sub(1), above.min(15));
    let off = |code: usize| (f32::from(IQ4_VALUES[code]) - x).abs();
    if off(low) <= off(high) { low } else { high }
}

/// The one furthest from zero.
fn furthest(x: &[f32]) -> f32 {
    x.iter()
        .fold(0.0, |far, x| if x.abs() > far.abs() { *x } else { far })
}

// Blocks of 256

/// Two factors of a block, each sub-block's scale and minimum in steps of these, and codes.
struct Affine<const J: usize> {
    scales: [u8; J],
    minima: [u8; J],
    codes: [u8; 256],
}

/// Fit `J` sub-blocks of `N` numbers with scales and minima of at most `steps`; `put` stores a factor at a place.
fn affine<const J: usize, const N: usize>(
    x: &[f32; 256],
    w: &[f32; 256],
    (levels, steps): (f32, f32),
    mut put: impl FnMut(usize, f32) -> f32,
) -> Affine<J> {
    let mut fits = [(0.0f32, 0.0f32); J];
    for (j, fit) in fits.iter_mut().enumerate() {
        *fit = fit_affine::<N>(&x[j * N..], &w[j * N..], levels);
    }
    let most = fits
        .iter()
        .fold((0.0f32, 0.0f32), |a, b| (a.0.max(b.0), a.1.max(b.1)));
    let (d, less) = (put(0, most.0 / steps), put(1, most.1 / steps));
    let (id, iless) = (inverse(d), inverse(less));
    let mut out = Affine {
        scales: [0; J],
        minima: [0; J],
        codes: [0; 256],
    };
    for (j, (scale, minimum)) in fits.into_iter().enumerate() {
        out.scales[j] = (scale * id).round().clamp(0.0, steps) as u8;
        out.minima[j] = (minimum * iless).round().clamp(0.0, steps) as u8;
        let id = inverse(d * f32::from(out.scales[j]));
        let less = less * f32::from(out.minima[j]);
        for (x, code) in x[j * N..].iter().zip(&mut out.codes[j * N..][..N]) {
            *code = ((x + less) * id).round().clamp(0.0, levels) as u8;
        }
    }
    out
}

/// Set two-bit code `i`, as `two_bits` reads it.
fn put_two_bits(b: &mut [u8], i: usize, code: u8) {
    b[i / 128 * 32 + i % 32] |= (code & 3) << (2 * (i / 32 % 4));
}

/// Set nibble `i`, as `k_nibble` reads it.
fn put_k_nibble(b: &mut [u8], i: usize, code: u8) {
    b[i / 64 * 32 + i % 32] |= (code & 15) << (4 * (i / 32 % 2));
}

/// Eight six-bit scales and minima in 12 bytes, as `k_scale_min` reads them.
fn put_k_scales(b: &mut [u8], scales: &[u8; 8], minima: &[u8; 8]) {
    for j in 0..4 {
        b[j] = scales[j] | scales[j + 4] >> 4 << 6;
        b[j + 4] = minima[j] | minima[j + 4] >> 4 << 6;
        b[j + 8] = scales[j + 4] & 15 | minima[j + 4] << 4;
    }
}

fn q2_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 84]) {
    let fit = affine::<16, 16>(x, w, (3.0, 15.0), |at, d| put_f16(b, 80 + 2 * at, d));
    let steps = fit.scales.iter().zip(fit.minima);
    for (b, (scale, minimum)) in b.iter_mut().zip(steps) {
        *b = scale | minimum << 4;
    }
    for (i, code) in fit.codes.into_iter().enumerate() {
        put_two_bits(&mut b[16..], i, code);
    }
}

fn q4_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 144]) {
    let fit = affine::<8, 32>(x, w, (15.0, 63.0), |at, d| put_f16(b, 2 * at, d));
    put_k_scales(&mut b[4..], &fit.scales, &fit.minima);
    for (i, code) in fit.codes.into_iter().enumerate() {
        put_k_nibble(&mut b[16..], i, code);
    }
}

fn q5_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 176]) {
    let fit = affine::<8, 32>(x, w, (31.0, 63.0), |at, d| put_f16(b, 2 * at, d));
    put_k_scales(&mut b[4..], &fit.scales, &fit.minima);
    for (i, code) in fit.codes.into_iter().enumerate() {
        put_k_nibble(&mut b[48..], i, code);
        b[16 + i % 32] |= (code >> 4) << (i / 32);
    }
}

/// Scales of sub-blocks as whole numbers of `-steps` to `steps - 1` times a factor, and the factor as it is to be stored.
fn whole_scales<const J: usize>(scales: &[f32; J], steps: f32) -> ([i8; J], f32) {
    let d = furthest(scales) / -steps;
    let id = inverse(f16_to_f32(f16::from_f32(d).to_bits()));
    let whole = scales.map(|s| (s * id).round().clamp(-steps, steps - 1.0) as i8);
    (whole, d)
}

fn q3_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 110]) {
    let mut scales = [0.0; 16];
    for (j, scale) in scales.iter_mut().enumerate() {
        *scale = fit_symmetric::<16>(&x[16 * j..], &w[16 * j..], 4.0);
    }
    let (scales, d) = whole_scales(&scales, 32.0);
    let d = put_f16(b, 108, d);
    for (j, scale) in scales.into_iter().enumerate() {
        let bits = (scale + 32) as u8;
        b[96 + j % 8] |= (bits & 15) << (4 * (j / 8));
        b[104 + j % 4] |= (bits >> 4) << (2 * (j / 4));
        let id = inverse(d * f32::from(scale));
        for i in 16 * j..16 * (j + 1) {
            let code = ((x[i] * id).round().clamp(-4.0, 3.0) + 4.0) as u8;
            put_two_bits(&mut b[32..96], i, code);
            b[i % 32] |= (code >> 2) << (i / 32);
        }
    }
}

fn q6_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 210]) {
    let mut scales = [0.0; 16];
    for (j, scale) in scales.iter_mut().enumerate() {
        *scale = fit_symmetric::<16>(&x[16 * j..], &w[16 * j..], 32.0);
    }
    let (scales, d) = whole_scales(&scales, 128.0);
    let d = put_f16(b, 208, d);
    for (j, scale) in scales.into_iter().enumerate() {
        b[192 + j] = scale as u8;
        let id = inverse(d * f32::from(scale));
        for i in 16 * j..16 * (j + 1) {
            let code = ((x[i] * id).round().clamp(-32.0, 31.0) + 32.0) as u8;
            b[i / 128 * 64 + i % 64] |= (code & 15) << (4 * (i / 64 % 2));
            put_two_bits(&mut b[128..192], i, code >> 4);
        }
    }
}

fn iq4_nl(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 18]) {
    let d = put_f16(b, 0, fit_table(x, w));
    put_table(x, d, &mut b[2..]);
}

fn put_table(x: &[f32], d: f32, b: &mut [u8]) {
    let id = inverse(d);
    for (i, x) in x.iter().enumerate() {
        put_nibble(b, i, nearest(x * id) as u8);
    }
}

fn iq4_xs(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 136]) {
    let mut scales = [0.0; 8];
    for ((scale, x), w) in scales.iter_mut().zip(x.as_chunks().0).zip(w.as_chunks().0) {
        *scale = fit_table(x, w);
    }
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
    fn nf4_and_fp4_take_the_nearest_value_and_of_two_the_smaller_code() {
        for (values, nearest) in [(NF4_VALUES, &NF4), (FP4_VALUES, &FP4)] {
            let definition = |x: f32| {
                let far = |code: &usize| (x - values[*code]).abs();
                (0..16).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap() as u8
            };
            let mut random = Random(9);
            let mut all: Vec<f32> = (0..100_000).map(|_| 2.0 * random.next() - 1.0).collect();
            for (a, b) in values.iter().flat_map(|a| values.map(|b| (*a, b))) {
                let middle = (a + b) * 0.5;
                all.extend([a, middle, middle.next_up(), middle.next_down(), -middle]);
            }
            all.extend(
                nearest
                    .edges
                    .iter()
                    .flat_map(|e| [*e, e.next_up(), e.next_down()]),
            );
            for x in all {
                assert_eq!(nearest.code(x), definition(x), "{x}");
            }
        }
        let mut blocks = [0xAA; 72];
        let mut x = [0.0; 128];
        (x[64], x[65], x[66]) = (f32::NAN, 1.0, f32::INFINITY);
        quantize(TensorType::FP4, &x, None, &mut blocks);
        assert_eq!(blocks[..36], [0; 36]);
        assert!(f32::from_le_bytes(blocks[36..40].try_into().unwrap()).is_nan());
        assert_eq!(blocks[40..], [0; 32]);
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
