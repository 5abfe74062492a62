//! Dequantisation of GGML's smallest types: IQ1, IQ2 and IQ3, by codebooks (`iq_grids.rs`), and the ternary TQ1 and TQ2. They
//! are read only: in memory they become Q8_0.
//!
//! A super-block of 256 numbers is groups of 8 (of 4 for IQ3), each an entry of the codebook with a scale of its own or shared
//! by some of them, and with signs. Bit for bit as the `gguf` Python package.

use crate::iq_grids::{IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};
use crate::quant::{f16_at, f16_to_f32, u16_at};

/// What an entry's two bits stand for in IQ2; three bits in IQ3_XXS.
const IQ2_VALUES: [f32; 3] = [8.0, 25.0, 43.0];
const IQ3_XXS_VALUES: [f32; 8] = [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0];

/// IQ1's numbers lie so far beside the ternary ones.
const DELTA: f32 = 0.125;

/// Number `i` of an entry of eight.
fn of_eight(entry: u16, i: usize) -> usize {
    usize::from(entry >> (2 * i) & 3)
}

/// Number `i` of an entry of four.
fn of_four(entry: u16, i: usize) -> usize {
    usize::from(entry >> (3 * i) & 7)
}

/// Eight signs from seven bits: the eighth makes their number even.
fn even_signs(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | ((seven.count_ones() as u8 & 1) << 7)
}

fn signed(x: f32, signs: u8, i: usize) -> f32 {
    if signs >> i & 1 == 0 { x } else { -x }
}

fn nibble_of(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 2] >> (4 * (i % 2)) & 15
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

/// The scale of IQ2, from its four bits.
fn scale_of_iq2(d: f32, bits: u8) -> f32 {
    d * (0.5 + f32::from(bits)) * 0.25
}

/// `d` f16, then for each 32 numbers 4 bytes of entries, 4 x 7 bits of signs and a scale of 4 bits.
pub fn iq2_xxs(b: &[u8; 66], y: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let (group, part) = (&b[2 + i / 32 * 8..], i / 8 % 4);
        let word = u32_at(group, 4);
        let value = IQ2_VALUES[of_eight(IQ2_XXS[usize::from(group[part])], i % 8)];
        let signs = even_signs(word >> (7 * part));
        *y = signed(scale_of_iq2(d, (word >> 28) as u8) * value, signs, i % 8);
    }
}

/// `d` f16, 32 entries of 9 bits with 7 of signs, 16 scales of 4 bits.
pub fn iq2_xs(b: &[u8; 74], y: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let word = u16_at(b, 2 + i / 8 * 2);
        let value = IQ2_VALUES[of_eight(IQ2_XS[usize::from(word & 511)], i % 8)];
        let scale = scale_of_iq2(d, nibble_of(&b[66..], i / 16));
        *y = signed(scale * value, even_signs(u32::from(word >> 9)), i % 8);
    }
}

/// `d` f16, 32 bytes of entries, 32 of signs, 8 of the entries' upper bits, 16 scales of 4 bits.
pub fn iq2_s(b: &[u8; 82], y: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let at = i / 8;
        let upper = b[66 + at / 4] >> (2 * (at % 4)) & 3;
        let entry = usize::from(b[2 + at]) | usize::from(upper) << 8;
        let value = IQ2_VALUES[of_eight(IQ2_S[entry], i % 8)];
        let scale = scale_of_iq2(d, nibble_of(&b[74..], i / 16));
        *y = signed(scale * value, b[34 + at], i % 8);
    }
}

/// `d` f16, 64 bytes of entries of four, then for each 32 numbers 4 x 7 bits of signs and a scale of 4 bits.
pub fn iq3_xxs(b: &[u8; 98], y: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let word = u32_at(b, 66 + i / 32 * 4);
        let value = IQ3_XXS_VALUES[of_four(IQ3_XXS[usize::from(b[2 + i / 4])], i % 4)];
        let scale = d * (0.5 + (word >> 28) as f32) * 0.5;
        let signs = even_signs(word >> (7 * (i / 8 % 4)));
        *y = signed(scale * value, signs, i % 8);
    }
}

/// `d` f16, 64 bytes of entries of four, 8 of their ninth bits, 32 of signs, 8 scales of 4 bits.
pub fn iq3_s(b: &[u8; 110], y: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let at = i / 4;
        let ninth = b[66 + at / 8] >> (at % 8) & 1;
        let entry = usize::from(b[2 + at]) | usize::from(ninth) << 8;
        // Odd numbers from 1 on.
        let value = (2 * of_four(IQ3_S[entry], i % 4) + 1) as f32;
        let scale = d * f32::from(1 + 2 * nibble_of(&b[106..], i / 32));
        *y = signed(scale * value, b[74 + i / 8], i % 8);
    }
}

/// An entry's number, less one, and `DELTA` to one side of it.
fn ternary(entry: usize, i: usize, below: bool) -> f32 {
    let delta = if below { -DELTA } else { DELTA };
    of_eight(IQ1[entry], i) as f32 - 1.0 + delta
}

/// `d` f16, 32 bytes of entries, then for each 32 numbers 4 x 3 upper bits, a scale of 3 bits, the side of `DELTA`.
pub fn iq1_s(b: &[u8; 50], y: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let word = u16_at(b, 34 + i / 32 * 2);
        let upper = word >> (3 * (i / 8 % 4)) & 7;
        let entry = usize::from(b[2 + i / 8]) | usize::from(upper) << 8;
        let scale = d * f32::from(2 * (word >> 12 & 7) + 1);
        *y = scale * ternary(entry, i % 8, word & 0x8000 != 0);
    }
}

/// 32 bytes of entries, 16 with 3 upper bits and the side of `DELTA` for each, 16 scales of 3 bits in four words whose upper
/// four bits are `d` f16.
pub fn iq1_m(b: &[u8; 56], y: &mut [f32; 256]) {
    let words = [0, 1, 2, 3].map(|i| u16_at(b, 48 + 2 * i));
    let parts = [0, 1, 2, 3].map(|i| words[i] >> 12 << (4 * i));
    let d = f16_to_f32(parts[0] | parts[1] | parts[2] | parts[3]);
    for (i, y) in y.iter_mut().enumerate() {
        let upper = nibble_of(&b[32..], i / 8);
        let entry = usize::from(b[i / 8]) | usize::from(upper & 7) << 8;
        let scale = d * f32::from(2 * (words[i / 64] >> (3 * (i / 16 % 4)) & 7) + 1);
        *y = scale * ternary(entry, i % 8, upper & 8 != 0);
    }
}

/// 48 bytes of five ternary digits and 4 of four, each byte a fraction of 256, `d` f16.
pub fn tq1_0(b: &[u8; 54], y: &mut [f32; 256]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let d = f16_at(b, 52);
    // Where bytes begin, how many they are, their first number.
    let parts = [(0, 32, 0), (32, 16, 160), (48, 4, 240)];
    for (i, y) in y.iter_mut().enumerate() {
        let (first, count, number) = parts[usize::from(i >= 160) + usize::from(i >= 240)];
        let (digit, at) = ((i - number) / count, (i - number) % count);
        let shifted = u16::from(b[first + at].wrapping_mul(POWERS[digit]));
        *y = d * (f32::from((shifted * 3) >> 8) - 1.0);
    }
}

/// 64 bytes of four ternary digits in two bits each, `d` f16.
pub fn tq2_0(b: &[u8; 66], y: &mut [f32; 256]) {
    let d = f16_at(b, 64);
    for (i, y) in y.iter_mut().enumerate() {
        let digit = b[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
        *y = d * (f32::from(digit) - 1.0);
    }
}
