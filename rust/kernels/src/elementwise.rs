//! What a decoder does to rows of floats between multiplications: norms, rotary positions, gated activations.
//!
//! Sixteen lanes at a time. Multiplications and additions fuse by name only, so every instruction set gives the same bits.

use crate::activations::{ActBlock, Scales, quantize_blocks};
use crate::pool::{Pool, SendPtr};
use crate::simd::{Isa, LANES, Simd, dispatch, load_part, store_part};
use crate::tile::BLOCK;

/// Rows times width below which threads cost more than they bring.
const SERIAL: usize = 8192;

/// Where rows go quantised as well.
pub struct Twin<'a> {
    pub scales: Scales,
    /// `[rows][width / 32]`
    pub blocks: &'a mut [ActBlock],
}

/// Run `f(i, row)` over the rows of `out`, in parallel when there is enough to do.
fn over_rows(pool: &Pool, out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() < SERIAL {
        out.chunks_exact_mut(width)
            .enumerate()
            .for_each(|(i, row)| f(i, row));
    } else {
        pool.rows(out, width, f);
    }
}

/// Sum of squares, sixteen lanes at a time, then the lanes in a fixed order.
#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: `load_part` stays inside `x`.
    unsafe {
        let mut lanes = S::splat(0.0);
        for at in (0..x.len()).step_by(LANES) {
            let x = load_part::<S>(x, at);
            lanes = S::fma(x, x, lanes);
        }
        S::sum(lanes)
    }
}

/// The sum, lanes first as above.
#[inline(always)]
unsafe fn total<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: `load_part` stays inside `x`.
    unsafe {
        let mut lanes = S::splat(0.0);
        for at in (0..x.len()).step_by(LANES) {
            lanes = S::add(load_part::<S>(x, at), lanes);
        }
        S::sum(lanes)
    }
}

/// `x *= scale * weight`; `weight` is as long as `x`.
#[inline(always)]
unsafe fn scale_by<S: Simd>(scale: f32, weight: &[f32], x: &mut [f32]) {
    // SAFETY: `load_part` and `store_part` stay inside their slices.
    unsafe {
        for at in (0..x.len()).step_by(LANES) {
            let y = S::mul(load_part::<S>(x, at), S::splat(scale));
            store_part::<S>(x, at, S::mul(y, load_part::<S>(weight, at)));
        }
    }
}

/// What a norm does to a row.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    pub weight: &'a [f32],
    /// As long as the weight.
    pub bias: Option<&'a [f32]>,
    pub eps: f32,
    /// Its mean is taken off first: LayerNorm (Ba et al. 2016, arXiv:1607.06450), else RMSNorm (Zhang and Sennrich
    /// 2019, arXiv:1910.07467).
    pub centred: bool,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight + bias`, row by row; of `x - mean(x)` where the norm is centred; and `out`
/// quantised to its twin if there is one.
///
/// # Panics
/// When the lengths do not agree.
pub fn norm(isa: Isa, pool: &Pool, x: &[f32], by: Norm, out: &mut [f32], twin: Option<Twin>) {
    assert_eq!(x.len(), out.len());
    let width = by.weight.len();
    assert!(
        by.bias.is_none_or(|b| b.len() == width),
        "a bias for each weight"
    );
    let norm = |i: usize, out: &mut [f32]| {
        out.copy_from_slice(&x[i * width..(i + 1) * width]);
        // SAFETY: slices; `isa` was detected.
        unsafe { norm_row(isa, by, out) }
    };
    let Some(Twin { scales, blocks }) = twin else {
        return over_rows(pool, out, width, norm);
    };
    let each = blocks.len() * width / out.len().max(1);
    assert!(each * BLOCK == width, "blocks of all rows");
    let blocks = SendPtr(blocks.as_mut_ptr());
    over_rows(pool, out, width, |i, out| {
        norm(i, out);
        // SAFETY: a row's blocks are its own, and inside the slice; `isa` was detected.
        unsafe {
            let blocks = std::slice::from_raw_parts_mut(blocks.get().add(i * each), each);
            quantize_blocks(isa, out, scales, blocks);
        }
    });
}

dispatch! {
    unsafe fn norm_row<>(by: Norm, row: &mut [f32]) = norm_body
}

/// One row, in place.
#[inline(always)]
unsafe fn norm_body<S: Simd>(by: Norm, row: &mut [f32]) {
    // SAFETY: `load_part` and `store_part` stay inside their slices, which are equally long.
    unsafe {
        if by.centred {
            let mean = S::splat(-total::<S>(row) / row.len() as f32);
            for at in (0..row.len()).step_by(LANES) {
                let x = S::add(load_part::<S>(row, at), mean);
                store_part::<S>(row, at, x);
            }
        }
        let scale = 1.0 / (sum_of_squares::<S>(row) / row.len() as f32 + by.eps).sqrt();
        scale_by::<S>(scale, by.weight, row);
        if let Some(bias) = by.bias {
            add_body::<S>(row, bias, 1.0);
        }
    }
}

/// `x += y * scale`, rounded once.
pub fn add(isa: Isa, pool: &Pool, x: &mut [f32], y: &[f32], scale: f32) {
    assert_eq!(x.len(), y.len());
    let width = if x.len() < SERIAL {
        x.len().max(1)
    } else {
        x.len().div_ceil(pool.threads() * 4)
    };
    let whole = x.len() / width * width;
    let (body, tail) = x.split_at_mut(whole);
    over_rows(pool, body, width, |i, x| {
        // SAFETY: slices; `isa` was detected.
        unsafe { add_row(isa, x, &y[i * width..(i + 1) * width], scale) }
    });
    // SAFETY: as above.
    unsafe { add_row(isa, tail, &y[whole..], scale) }
}

dispatch! {
    unsafe fn add_row<>(x: &mut [f32], y: &[f32], scale: f32) = add_body
}

#[inline(always)]
unsafe fn add_body<S: Simd>(x: &mut [f32], y: &[f32], scale: f32) {
    // SAFETY: `load_part` and `store_part` stay inside their slices, which are equally long.
    unsafe {
        for at in (0..x.len()).step_by(LANES) {
            let sum = S::fma(
                load_part::<S>(y, at),
                S::splat(scale),
                load_part::<S>(x, at),
            );
            store_part::<S>(x, at, sum);
        }
    }
}

/// The activations of feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// The tanh form of gelu.
    GeluTanh,
    /// gelu itself (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    Gelu,
    Relu,
    /// The square of relu (So et al. 2021, arXiv:2109.08668).
    ReluSquared,
    /// gpt-oss: x * sigmoid(1.702 x) of x up to 7; what it gates is kept within 7 of 0, and one added.
    ClampedSwish,
    /// xIELU (Huang and Schlag 2024, arXiv:2411.13010): above 0 `positive x^2 + beta x`, below it
    /// `negative (e^x - 1 - x) + beta x`.
    Xielu {
        positive: f32,
        negative: f32,
        beta: f32,
    },
}

/// Where [`Activation::ClampedSwish`] cuts, and what its sigmoid sees.
pub const SWISH_LIMIT: f32 = 7.0;
pub const SWISH_ALPHA: f32 = 1.702;

/// `activation(g) * u`.
#[inline(always)]
pub(crate) unsafe fn gate<S: Simd>(activation: Activation, g: S::F, u: S::F) -> S::F {
    unsafe {
        if activation == Activation::ClampedSwish {
            let u = S::add(
                at_most::<S>(S::max(u, S::splat(-SWISH_LIMIT)), SWISH_LIMIT),
                S::splat(1.0),
            );
            return S::mul(activate::<S>(activation, g), u);
        }
        S::mul(activate::<S>(activation, g), u)
    }
}

/// What the product of a matrix becomes where something was added to it first: `out = activation(x)`, or, of rows with gates
/// before the rest, `activation(gate) * rest`. The same bits as of [`crate::matmul::gated`].
///
/// # Panics
/// When the lengths do not agree.
pub fn activate_rows(
    isa: Isa,
    pool: &Pool,
    activation: Activation,
    gated: bool,
    x: &[f32],
    width: usize,
    out: &mut [f32],
) {
    let whole = width * (1 + usize::from(gated));
    assert_eq!(x.len() * width, out.len() * whole, "rows of {whole}");
    over_rows(pool, out, width.max(1), |i, out| {
        let (gates, rest) = x[i * whole..(i + 1) * whole].split_at(width);
        let rest = gated.then_some(rest);
        // SAFETY: slices of `width`; `isa` was detected.
        unsafe { activate_row(isa, activation, gates, rest, out) }
    });
}

dispatch! {
    unsafe fn activate_row<>(activation: Activation, gates: &[f32], rest: Option<&[f32]>, out: &mut [f32]) = activate_body
}

#[inline(always)]
unsafe fn activate_body<S: Simd>(
    activation: Activation,
    gates: &[f32],
    rest: Option<&[f32]>,
    out: &mut [f32],
) {
    // SAFETY: `load_part` and `store_part` stay inside their slices, which are equally long.
    unsafe {
        for at in (0..out.len()).step_by(LANES) {
            let g = load_part::<S>(gates, at);
            let y = match rest {
                Some(rest) => gate::<S>(activation, g, load_part::<S>(rest, at)),
                None => activate::<S>(activation, g),
            };
            store_part::<S>(out, at, y);
        }
    }
}

#[inline(always)]
unsafe fn at_most<S: Simd>(x: S::F, most: f32) -> S::F {
    unsafe {
        let less = S::max(S::mul(x, S::splat(-1.0)), S::splat(-most));
        S::mul(less, S::splat(-1.0))
    }
}

#[inline(always)]
pub(crate) unsafe fn activate<S: Simd>(activation: Activation, x: S::F) -> S::F {
    unsafe {
        let (x, exponent) = match activation {
            Activation::Silu => (x, S::mul(x, S::splat(-1.0))),
            Activation::GeluTanh => {
                // 0.5 (1 + tanh(t)) is sigmoid(2 t).
                let cubic = S::mul(S::mul(S::splat(0.044_715), x), x);
                let t = S::mul(S::splat(0.797_884_6), S::fma(cubic, x, x));
                (x, S::mul(S::splat(-2.0), t))
            }
            Activation::ClampedSwish => {
                let x = at_most::<S>(x, SWISH_LIMIT);
                (x, S::mul(S::splat(-SWISH_ALPHA), x))
            }
            Activation::Gelu => return gelu::<S>(x),
            Activation::Relu => return S::max(x, S::splat(0.0)),
            Activation::ReluSquared => {
                let x = S::max(x, S::splat(0.0));
                return S::mul(x, x);
            }
            Activation::Xielu {
                positive,
                negative,
                beta,
            } => {
                let above = S::max(x, S::splat(0.0));
                let below = at_most::<S>(x, 0.0);
                let less = S::fma(below, S::splat(-1.0), S::splat(-1.0));
                let curve = S::mul(S::add(S::exp(below), less), S::splat(negative));
                let square = S::fma(S::mul(above, S::splat(positive)), above, curve);
                return S::fma(x, S::splat(beta), square);
            }
        };
        S::div(x, S::add(S::splat(1.0), S::exp(exponent)))
    }
}

/// `x (1 + erf(x / sqrt 2)) / 2` by Abramowitz and Stegun 7.1.26: erf to 1.5e-7. With `q = 1 - erf(|x| / sqrt 2)`, that is
/// `max(x, 0) - |x| q / 2`, which needs no sign.
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::F) -> S::F {
    const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    const TERMS: [f32; 4] = [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    unsafe {
        let size = S::abs(x);
        let t = S::div(S::splat(1.0), S::fma(size, S::splat(P), S::splat(1.0)));
        let mut q = S::splat(1.061_405_4);
        for term in TERMS {
            q = S::fma(q, t, S::splat(term));
        }
        let e = S::exp(S::mul(S::mul(x, x), S::splat(-0.5)));
        let half = S::mul(S::mul(size, S::splat(-0.5)), S::mul(S::mul(q, t), e));
        S::add(S::max(S::splat(0.0), x), half)
    }
}

/// `cap * tanh(x / cap)` (gemma 2).
#[inline(always)]
pub(crate) unsafe fn softcap<S: Simd>(cap: f32, x: S::F) -> S::F {
    unsafe {
        // tanh(t) = 1 - 2 / (exp(2 t) + 1); the exponential saturates, so that infinity gives the cap.
        let e = S::exp(S::div(S::add(x, x), S::splat(cap)));
        let less = S::div(S::splat(-2.0), S::add(e, S::splat(1.0)));
        S::mul(S::splat(cap), S::add(S::splat(1.0), less))
    }
}

pub(crate) const EXP_LOW: f32 = -87.0;
pub(crate) const EXP_HIGH: f32 = 88.0;
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// Of the sixth to the second power.
pub(crate) const EXP_POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// e to the x: 2^n times a polynomial on [-ln2/2, ln2/2], relative error below 2e-7; saturates instead of overflowing. The
/// definition of `Simd::exp`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = if x < EXP_LOW { EXP_LOW } else { x };
    let x = if x > EXP_HIGH { EXP_HIGH } else { x };
    let n = (x * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let [first, rest @ ..] = EXP_POLYNOMIAL;
    let p = rest.iter().fold(first, |p, c| p.mul_add(r, *c));
    let p = p.mul_add(r * r, r) + 1.0;
    // NaN becomes 0 here and comes out through p.
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

pub(crate) const EXP2_LOW: f32 = -126.0;
/// Of the fifth to the first power, and 1.
pub(crate) const EXP2_POLYNOMIAL: [f32; 6] = [
    1.330_060_5e-3,
    9.669_691e-3,
    5.550_558_5e-2,
    0.240_222_83,
    std::f32::consts::LN_2,
    1.0,
];

/// 2 to the x for x up to 0: 2^n times a polynomial on [-1/2, 1/2], relative error below 2e-7; at least 2^-126. The
/// definition of `Simd::exp2`.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let x = if x < EXP2_LOW { EXP2_LOW } else { x };
    let n = x.round_ties_even();
    let r = x - n;
    let [first, rest @ ..] = EXP2_POLYNOMIAL;
    let p = rest.iter().fold(first, |p, c| p.mul_add(r, *c));
    // NaN adds 0 here.
    f32::from_bits(p.to_bits().wrapping_add((n as i32 as u32) << 23))
}

/// How rotary embeddings pair the numbers of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// `i` with `i + dim / 2` (transformers, GPT-NeoX).
    Halves,
    /// `2 i` with `2 i + 1` (GGUF llama, GPT-J).
    Neighbours,
}

/// Rotate the first `2 * cos.len()` numbers of a head by the angles of its position (Su et al. 2021, arXiv:2104.09864).
#[inline(always)]
fn rotate(head: &mut [f32], pairing: Pairing, cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    let (head, sin) = (&mut head[..2 * n], &sin[..n]);
    match pairing {
        Pairing::Halves => {
            let (first, second) = head.split_at_mut(n);
            for i in 0..n {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
        Pairing::Neighbours => {
            for i in 0..n {
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                head[2 * i] = a * cos[i] - b * sin[i];
                head[2 * i + 1] = b * cos[i] + a * sin[i];
            }
        }
    }
}

/// What happens to the query and key heads of a row before they meet.
pub struct HeadPrep<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norms: Option<HeadNorms<'a>>,
    /// Multiplies the queries of a row, `[rows]`.
    pub query_scale: Option<&'a [f32]>,
    /// Angles per row, `[rows][angles]`; `None`: no positions (NoPE layers).
    pub rotation: Option<Rotation<'a>>,
}

/// Norms of queries and keys.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Weights of all heads' numbers, one head after the other.
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub eps: f32,
    /// See [`Norm::centred`].
    pub centred: bool,
    /// All heads of a row are one vector (olmo 2); else each is its own.
    pub together: bool,
    /// The rotation comes first (hunyuan).
    pub last: bool,
}

/// Cosines and sines of every row's position.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    pub pairing: Pairing,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Angles per row.
    pub angles: usize,
}

/// Norm and rotate the query and key heads of rows `[q | k | v]`, in place.
pub fn prepare_heads(isa: Isa, pool: &Pool, prep: &HeadPrep, qkv: &mut [f32], width: usize) {
    over_rows(pool, qkv, width, |i, row| {
        // SAFETY: slices; `isa` was detected.
        unsafe { prepare_row(isa, prep, i, row) }
    });
}

dispatch! {
    unsafe fn prepare_row<>(prep: &HeadPrep, i: usize, row: &mut [f32]) = prepare_body
}

#[inline(always)]
unsafe fn prepare_body<S: Simd>(prep: &HeadPrep, i: usize, row: &mut [f32]) {
    let dim = prep.head_dim;
    let (q, rest) = row.split_at_mut(prep.heads * dim);
    let k = &mut rest[..prep.kv_heads * dim];
    if let Some(norms) = prep.norms.filter(|norms| !norms.last) {
        // SAFETY: slices.
        unsafe { norm_heads::<S>(&norms, dim, q, k) }
    }
    if let Some(r) = prep.rotation {
        let at = i * r.angles..(i + 1) * r.angles;
        let (cos, sin) = (&r.cos[at.clone()], &r.sin[at]);
        for head in q.chunks_exact_mut(dim).chain(k.chunks_exact_mut(dim)) {
            rotate(head, r.pairing, cos, sin);
        }
    }
    if let Some(norms) = prep.norms.filter(|norms| norms.last) {
        // SAFETY: slices.
        unsafe { norm_heads::<S>(&norms, dim, q, k) }
    }
    if let Some(scale) = prep.query_scale {
        q.iter_mut().for_each(|x| *x *= scale[i]);
    }
}

#[inline(always)]
unsafe fn norm_heads<S: Simd>(norms: &HeadNorms, dim: usize, q: &mut [f32], k: &mut [f32]) {
    for (part, weight) in [(q, norms.q), (k, norms.k)] {
        let width = if norms.together { part.len() } else { dim };
        for (x, weight) in part.chunks_exact_mut(width).zip(weight.chunks_exact(width)) {
            let (eps, centred) = (norms.eps, norms.centred);
            let by = Norm {
                weight,
                bias: None,
                eps,
                centred,
            };
            // SAFETY: slices of the same length.
            unsafe { norm_body::<S>(by, x) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::quantize_rows;
    use crate::scalar::Scalar;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 97.0)
            .collect()
    }

    fn rms(weight: &[f32]) -> Norm<'_> {
        Norm {
            weight,
            bias: None,
            eps: 1e-5,
            centred: false,
        }
    }

    /// Run `f` on every instruction set; all must give the bits of the first, scalar one, which is returned.
    fn same_on_all(f: impl Fn(Isa) -> Vec<f32>) -> Vec<f32> {
        let want = f(Isa::SCALAR);
        for isa in Isa::available() {
            assert_eq!(f(isa), want, "{}", isa.name());
        }
        want
    }

    #[test]
    fn exp_is_exp() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / want - 1.0).abs() < 3e-7,
                "exp({x}) = {got}, want {want}"
            );
        }
        assert!(
            exp(f32::NEG_INFINITY) < 1e-37
                && exp(f32::INFINITY).is_finite()
                && exp(f32::NAN).is_nan()
        );
    }

    #[test]
    fn exp2_is_exp2() {
        for i in -12600..=0 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp2(x)), f64::from(x).exp2());
            assert!(
                (got / want - 1.0).abs() < 2e-7,
                "exp2({x}) = {got}, want {want}"
            );
        }
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(f32::NEG_INFINITY), f32::MIN_POSITIVE);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn rms_norm_divides_by_the_root_mean_square() {
        let pool = Pool::new(2);
        let (x, w) = (numbers(300 * 40), numbers(40));
        let got = same_on_all(|isa| {
            let mut out = vec![0.0; x.len()];
            norm(isa, &pool, &x, rms(&w), &mut out, None);
            out
        });
        for (x, got) in x.chunks(40).zip(got.chunks(40)) {
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 40.0;
            for i in 0..40 {
                let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                assert!((f64::from(got[i]) - want).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_centred_norm_takes_the_mean_off_and_adds_the_bias() {
        let pool = Pool::new(2);
        let (x, weight, bias) = (numbers(3 * 40), numbers(40), numbers(40));
        let by = Norm {
            weight: &weight,
            bias: Some(&bias),
            eps: 1e-3,
            centred: true,
        };
        let got = same_on_all(|isa| {
            let mut out = vec![0.0; x.len()];
            norm(isa, &pool, &x, by, &mut out, None);
            out
        });
        for (x, got) in x.chunks(40).zip(got.chunks(40)) {
            let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / 40.0;
            let squares = x.iter().map(|x| (f64::from(*x) - mean).powi(2));
            let scale = (squares.sum::<f64>() / 40.0 + 1e-3).sqrt();
            for i in 0..40 {
                let want =
                    (f64::from(x[i]) - mean) / scale * f64::from(weight[i]) + f64::from(bias[i]);
                assert!((f64::from(got[i]) - want).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn norms_of_heads_are_each_heads_own_or_all_together() {
        let pool = Pool::new(1);
        let row: Vec<f32> = vec![3.0, 4.0, 1.0, 1.0, 6.0, 8.0, 9.0, 9.0];
        let normed = |together, centred| {
            let norms = Some(HeadNorms {
                q: &[1.0, 1.0, 2.0, 2.0],
                k: &[1.0, 0.5],
                eps: 0.0,
                centred,
                together,
                last: false,
            });
            let prep = HeadPrep {
                heads: 2,
                kv_heads: 1,
                head_dim: 2,
                norms,
                query_scale: Some(&[10.0]),
                rotation: None,
            };
            let mut row = row.clone();
            prepare_heads(Isa::detect(), &pool, &prep, &mut row, 8);
            row
        };
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        let (a, b) = (12.5f32.sqrt(), 50f32.sqrt());
        let want = [30.0 / a, 40.0 / a, 20.0, 20.0, 6.0 / b, 4.0 / b, 9.0, 9.0];
        assert!(close(&normed(false, false), &want));
        let all = 6.75f32.sqrt();
        let want = [
            30.0 / all,
            40.0 / all,
            20.0 / all,
            20.0 / all,
            6.0 / b,
            4.0 / b,
            9.0,
            9.0,
        ];
        assert!(close(&normed(true, false), &want));
        let centred = normed(false, true);
        assert!(close(&centred[..2], &[-10.0, 10.0]) && close(&centred[4..6], &[-1.0, 0.5]));
    }

    #[test]
    fn norms_that_come_last_see_what_was_rotated() {
        let pool = Pool::new(1);
        let (cos, sin) = ([0.0], [1.0]);
        let turned = |last| {
            let norms = Some(HeadNorms {
                q: &[1.0, 2.0],
                k: &[3.0, 1.0],
                eps: 0.0,
                centred: false,
                together: false,
                last,
            });
            let rotation = Some(Rotation {
                pairing: Pairing::Halves,
                cos: &cos,
                sin: &sin,
                angles: 1,
            });
            let prep = HeadPrep {
                heads: 1,
                kv_heads: 1,
                head_dim: 2,
                norms,
                query_scale: None,
                rotation,
            };
            let mut row = vec![3.0, 4.0, 1.0, 1.0, 9.0, 9.0];
            prepare_heads(Isa::detect(), &pool, &prep, &mut row, 6);
            row
        };
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        let rms = 12.5f32.sqrt();
        let want = [-4.0 / rms, 6.0 / rms, -3.0, 1.0, 9.0, 9.0];
        assert!(close(&turned(true), &want), "{:?}", turned(true));
        let want = [-8.0 / rms, 3.0 / rms, -1.0, 3.0, 9.0, 9.0];
        assert!(close(&turned(false), &want), "{:?}", turned(false));
    }

    #[test]
    fn activations_are_their_definitions() {
        // erf(x / sqrt 2) by its series, for |x| up to 4.
        let erf = |x: f64| {
            let x = x / 2f64.sqrt();
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for i in -400..=400 {
            let x = f64::from(i) / 100.0;
            let swish = |x: f64| x.min(7.0) * sigmoid(1.702 * x.min(7.0));
            let xielu = Activation::Xielu {
                positive: 0.75,
                negative: 1.25,
                beta: 0.5,
            };
            let bent = match x > 0.0 {
                true => 0.75 * x * x + 0.5 * x,
                false => 1.25 * (x.exp_m1() - x) + 0.5 * x,
            };
            for (activation, want) in [
                (Activation::Silu, x * sigmoid(x)),
                (Activation::Gelu, x * (1.0 + erf(x)) / 2.0),
                (Activation::Relu, x.max(0.0)),
                (Activation::ReluSquared, x.max(0.0).powi(2)),
                (Activation::ClampedSwish, swish(x)),
                (xielu, bent),
            ] {
                // SAFETY: plain arrays run everywhere.
                let got = unsafe { activate::<Scalar>(activation, Scalar::splat(x as f32)) }[0];
                let error = (f64::from(got) - want).abs();
                assert!(
                    error < 1e-6 * (1.0 + want.abs()),
                    "{activation:?} of {x}: {got}"
                );
            }
        }
        // SAFETY: as above.
        let gated = unsafe {
            let (g, u) = (Scalar::splat(9.0), Scalar::splat(-8.0));
            gate::<Scalar>(Activation::ClampedSwish, g, u)
        };
        assert!((gated[0] - 7.0 * -6.0).abs() < 1e-3);
    }

    #[test]
    fn what_is_quantised_on_the_way_is_what_quantize_rows_makes() {
        let pool = Pool::new(2);
        for (rows, scales) in [
            (1, Scales::Block),
            (40, Scales::Block),
            (1, Scales::Super),
            (40, Scales::Super),
        ] {
            let (x, w) = (numbers(rows * 512), numbers(512));
            for isa in Isa::available() {
                let mut out = vec![0.0; rows * 512];
                let mut blocks = vec![ActBlock::default(); rows * 16];
                let mut want = blocks.clone();
                let blocks_all = &mut blocks;
                let twin = Some(Twin {
                    scales,
                    blocks: blocks_all,
                });
                norm(isa, &pool, &x, rms(&w), &mut out, twin);
                quantize_rows(isa, &pool, &out, 512, scales, &mut want);
                assert_eq!(blocks, want);
            }
        }
    }

    #[test]
    fn addition_covers_every_element() {
        let pool = Pool::new(2);
        for n in [0, 1, 100, 8191, 8192, 50_001] {
            let y = numbers(n);
            let got = same_on_all(|isa| {
                let mut x = vec![1.0; n];
                add(isa, &pool, &mut x, &y, 2.0);
                x
            });
            assert!(got.iter().zip(&y).all(|(x, y)| *x == y.mul_add(2.0, 1.0)));
        }
    }

    #[test]
    fn rotation_turns_pairs_and_leaves_values_alone() {
        let pool = Pool::new(1);
        let (cos, sin) = ([0.6, 1.0], [0.8, 0.0]);
        let turned = |pairing| {
            let rotation = Some(Rotation {
                pairing,
                cos: &cos,
                sin: &sin,
                angles: 2,
            });
            let prep = HeadPrep {
                heads: 1,
                kv_heads: 1,
                head_dim: 4,
                norms: None,
                query_scale: None,
                rotation,
            };
            let mut row: Vec<f32> = (1..=12).map(|x| x as f32).collect();
            prepare_heads(Isa::detect(), &pool, &prep, &mut row, 12);
            row
        };
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        let halves = turned(Pairing::Halves);
        assert!(
            close(
                &halves[..4],
                &[1.0 * 0.6 - 3.0 * 0.8, 2.0, 3.0 * 0.6 + 1.0 * 0.8, 4.0]
            ),
            "{halves:?}"
        );
        let neighbours = turned(Pairing::Neighbours);
        assert!(close(
            &neighbours[4..8],
            &[5.0 * 0.6 - 6.0 * 0.8, 6.0 * 0.6 + 5.0 * 0.8, 7.0, 8.0]
        ));
        assert_eq!(halves[8..], [9.0, 10.0, 11.0, 12.0]);
    }
}
