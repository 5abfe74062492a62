//! Block layouts of the tensor types, and their dequantisation: the definition, and the oracle of the fast ones.
//!
//! The layouts are GGML's, all little-endian. A row of `k` numbers is `k / block_len` blocks, each holding its numbers
//! in order; every function below writes them exactly as the `gguf` Python package does, bit for bit. NF4 and FP4 are
//! bitsandbytes': no GGUF file has them.

use crate::iq;

/// How a tensor's numbers are stored. Names and ids are GGUF's, but for NF4 and FP4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
// The field's own spelling: people compare it with file names and error messages.
#[allow(non_camel_case_types, reason = "the names are the format's")]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    BF16,
    MXFP4,
    /// 64 numbers: their absolute maximum in f32, and codes of [`NF4_VALUES`] (Dettmers et al., QLoRA, 2023).
    NF4,
    /// The same of [`FP4_VALUES`].
    FP4,
    // Read only: see `READ_ONLY`.
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ3_S,
    IQ2_S,
    IQ1_M,
    TQ1_0,
    TQ2_0,
}

impl TensorType {
    /// Every type that is kept and multiplied: those of GGUF files, in the order of their ids, and the others.
    pub const ALL: [Self; 18] = {
        let mut all = [Self::NF4; 18];
        let mut i = 0;
        while i < 16 {
            all[i] = Self::GGUF[i];
            i += 1;
        }
        all[17] = Self::FP4;
        all
    };

    /// Those of GGUF files that are read, and kept as another: [`TensorType::resident`].
    pub const READ_ONLY: [Self; 9] = [
        Self::IQ2_XXS,
        Self::IQ2_XS,
        Self::IQ3_XXS,
        Self::IQ1_S,
        Self::IQ3_S,
        Self::IQ2_S,
        Self::IQ1_M,
        Self::TQ1_0,
        Self::TQ2_0,
    ];

    /// Those of GGUF files that are kept as they are.
    pub const GGUF: [Self; 16] = [
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::BF16,
        Self::MXFP4,
    ];

    /// The table of the format: GGUF id, name, numbers per block, bytes per block.
    const fn row(self) -> (Option<u32>, &'static str, usize, usize) {
        let (id, name, numbers, bytes) = match self {
            Self::NF4 => return (None, "NF4", 64, 36),
            Self::FP4 => return (None, "FP4", 64, 36),
            Self::F32 => (0, "F32", 1, 4),
            Self::F16 => (1, "F16", 1, 2),
            Self::Q4_0 => (2, "Q4_0", 32, 18),
            Self::Q4_1 => (3, "Q4_1", 32, 20),
            Self::Q5_0 => (6, "Q5_0", 32, 22),
            Self::Q5_1 => (7, "Q5_1", 32, 24),
            Self::Q8_0 => (8, "Q8_0", 32, 34),
            Self::Q2_K => (10, "Q2_K", 256, 84),
            Self::Q3_K => (11, "Q3_K", 256, 110),
            Self::Q4_K => (12, "Q4_K", 256, 144),
            Self::Q5_K => (13, "Q5_K", 256, 176),
            Self::Q6_K => (14, "Q6_K", 256, 210),
            Self::IQ4_NL => (20, "IQ4_NL", 32, 18),
            Self::IQ4_XS => (23, "IQ4_XS", 256, 136),
            Self::BF16 => (30, "BF16", 1, 2),
            Self::MXFP4 => (39, "MXFP4", 32, 17),
            Self::IQ2_XXS => (16, "IQ2_XXS", 256, 66),
            Self::IQ2_XS => (17, "IQ2_XS", 256, 74),
            Self::IQ3_XXS => (18, "IQ3_XXS", 256, 98),
            Self::IQ1_S => (19, "IQ1_S", 256, 50),
            Self::IQ3_S => (21, "IQ3_S", 256, 110),
            Self::IQ2_S => (22, "IQ2_S", 256, 82),
            Self::IQ1_M => (29, "IQ1_M", 256, 56),
            Self::TQ1_0 => (34, "TQ1_0", 256, 54),
            Self::TQ2_0 => (35, "TQ2_0", 256, 66),
        };
        (Some(id), name, numbers, bytes)
    }

    /// The type with this GGUF id, if it is one we read.
    pub fn from_id(id: u32) -> Option<Self> {
        let mut known = Self::GGUF.into_iter().chain(Self::READ_ONLY);
        known.find(|t| t.id() == Some(id))
    }

    /// The type of this name, in any case: `"Q4_K"`, `"bf16"`.
    pub fn from_name(name: &str) -> Option<Self> {
        let mut known = Self::ALL.into_iter().chain(Self::READ_ONLY);
        known.find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// What it is kept as in memory: itself, or Q8_0 for those that are read only.
    pub fn resident(self) -> Self {
        match Self::READ_ONLY.contains(&self) {
            true => Self::Q8_0,
            false => self,
        }
    }

    /// GGUF's number for it; none where no GGUF file has it.
    pub const fn id(self) -> Option<u32> {
        self.row().0
    }

    /// GGUF's name for it, or bitsandbytes' in capitals.
    pub const fn name(self) -> &'static str {
        self.row().1
    }

    /// Numbers per block.
    pub const fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Bytes of a row of `k` numbers; `None` where `k` is no whole number of blocks, or the bytes overflow.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// Write the numbers of `blocks` to `out`.
///
/// # Panics
/// Where `out` is no whole number of blocks, or `blocks` is not exactly as long as `out` asks: a defect of the caller.
pub fn dequantize(ty: TensorType, blocks: &[u8], out: &mut [f32]) {
    assert_eq!(
        Some(blocks.len()),
        ty.row_bytes(out.len()),
        "{} numbers of {}",
        out.len(),
        ty.name()
    );
    match ty {
        TensorType::F32 => each(blocks, out, |b: &[u8; 4], y| *y = [f32::from_le_bytes(*b)]),
        TensorType::F16 => each(blocks, out, |b: &[u8; 2], y| {
            *y = [f16_to_f32(u16::from_le_bytes(*b))]
        }),
        TensorType::BF16 => each(blocks, out, |b: &[u8; 2], y| {
            *y = [bf16_to_f32(u16::from_le_bytes(*b))]
        }),
        TensorType::Q4_0 => each(blocks, out, q4_0),
        TensorType::Q4_1 => each(blocks, out, q4_1),
        TensorType::Q5_0 => each(blocks, out, q5_0),
        TensorType::Q5_1 => each(blocks, out, q5_1),
        TensorType::Q8_0 => each(blocks, out, q8_0),
        TensorType::Q2_K => each(blocks, out, q2_k),
        TensorType::Q3_K => each(blocks, out, q3_k),
        TensorType::Q4_K => each(blocks, out, q4_k),
        TensorType::Q5_K => each(blocks, out, q5_k),
        TensorType::Q6_K => each(blocks, out, q6_k),
        TensorType::IQ4_NL => each(blocks, out, iq4_nl),
        TensorType::IQ4_XS => each(blocks, out, iq4_xs),
        TensorType::MXFP4 => each(blocks, out, mxfp4),
        TensorType::IQ2_XXS => each(blocks, out, iq::iq2_xxs),
        TensorType::IQ2_XS => each(blocks, out, iq::iq2_xs),
        TensorType::IQ3_XXS => each(blocks, out, iq::iq3_xxs),
        TensorType::IQ1_S => each(blocks, out, iq::iq1_s),
        TensorType::IQ3_S => each(blocks, out, iq::iq3_s),
        TensorType::IQ2_S => each(blocks, out, iq::iq2_s),
        TensorType::IQ1_M => each(blocks, out, iq::iq1_m),
        TensorType::TQ1_0 => each(blocks, out, iq::tq1_0),
        TensorType::TQ2_0 => each(blocks, out, iq::tq2_0),
        TensorType::NF4 => each(blocks, out, |b, y| of_64(b, y, &NF4_VALUES)),
        TensorType::FP4 => each(blocks, out, |b, y| of_64(b, y, &FP4_VALUES)),
    }
}

/// Apply one type's function to every block of `B` bytes and `N` numbers.
fn each<const B: usize, const N: usize>(
    blocks: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (b, y) in blocks.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        block(b, y);
    }
}

// Shared pieces

/// The values a 4-bit code stands for in IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice the values of an FP4 (e2m1) code, as MXFP4 uses them: [`e8m0_half_to_f32`] gives half the scale.
pub const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What the codes of NF4 stand for, times the block's absolute maximum: quantiles of the normal distribution.
pub const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The same of bitsandbytes' FP4: sign, two bits of exponent, one of fraction; the largest is 1.
pub const FP4_VALUES: [f32; 16] = {
    const TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        values[i] = TWELFTHS[i] / 12.0;
        values[i + 8] = 0.0 - values[i];
        i += 1;
    }
    values
};

/// IEEE half precision to single, exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// bfloat16 to single: the upper half of its bits, exact.
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Half the power of two that an E8M0 byte stands for: `2^(e - 128)`. The two smallest are subnormal.
pub const fn e8m0_half_to_f32(e: u8) -> f32 {
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        (e as u32 - 1) << 23
    })
}

/// The 6-bit scale and minimum of sub-block `j` (0..8) of Q4_K and Q5_K, from their 12 packed bytes.
pub const fn k_scale_min(j: usize, scales: &[u8]) -> (u8, u8) {
    if j < 4 {
        return (scales[j] & 63, scales[j + 4] & 63);
    }
    // The low four bits lie in the third group of four bytes, the high two on top of the first two groups.
    let low = scales[j + 4];
    (
        low & 15 | scales[j - 4] >> 6 << 4,
        low >> 4 | scales[j] >> 6 << 4,
    )
}

/// The 6-bit scale of sub-block `j` (0..16) of Q3_K, less its offset of 32, from their 12 packed bytes.
pub const fn q3_k_scale(j: usize, scales: &[u8]) -> i8 {
    let low = if j < 8 {
        scales[j] & 15
    } else {
        scales[j - 8] >> 4
    };
    let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    (low | high << 4) as i8 - 32
}

/// The 6-bit scale of sub-block `j` (0..8) of IQ4_XS, less its offset of 32.
pub const fn iq4_xs_scale(j: usize, high: u16, low: &[u8]) -> i8 {
    let low = low[j / 2] >> (4 * (j % 2)) & 15;
    let high = (high >> (2 * j) & 3) as u8;
    (low | high << 4) as i8 - 32
}

pub(crate) fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

pub(crate) fn f16_at(b: &[u8], at: usize) -> f32 {
    f16_to_f32(u16_at(b, at))
}

/// Code `i` of a block of 32 nibbles: the low halves of 16 bytes, then the high halves.
fn nibble(qs: &[u8], i: usize) -> u8 {
    qs[i % 16] >> (4 * (i / 16)) & 15
}

// Blocks of 32

/// `d` f16, 16 bytes of nibbles: d (q - 8).
fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * (nibble(&b[2..], i) as f32 - 8.0);
    }
}

/// `d`, `m` f16, 16 bytes of nibbles: d q + m.
fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * nibble(&b[4..], i) as f32 + m;
    }
}

/// The fifth bit of code `i`, in place: bit `i` of four bytes.
fn fifth_bit(qh: &[u8], i: usize) -> u8 {
    (qh[i / 8] >> (i % 8) & 1) << 4
}

/// `d` f16, 32 fifth bits, 16 bytes of nibbles: d (q - 16).
fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * ((nibble(&b[6..], i) | fifth_bit(&b[2..], i)) as f32 - 16.0);
    }
}

/// `d`, `m` f16, 32 fifth bits, 16 bytes of nibbles: d q + m.
fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * (nibble(&b[8..], i) | fifth_bit(&b[4..], i)) as f32 + m;
    }
}

/// `d` f16, 32 signed bytes: d q.
fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * b[2 + i] as i8 as f32;
    }
}

/// `d` f16, 16 bytes of nibbles into [`IQ4_VALUES`].
fn iq4_nl(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * IQ4_VALUES[nibble(&b[2..], i) as usize] as f32;
    }
}

/// An E8M0 byte, 16 bytes of nibbles into [`E2M1_DOUBLED`] (OCP Microscaling Formats 1.0).
fn mxfp4(b: &[u8; 17], y: &mut [f32; 32]) {
    let d = e8m0_half_to_f32(b[0]);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * E2M1_DOUBLED[nibble(&b[1..], i) as usize] as f32;
    }
}

// Blocks of 64

/// The absolute maximum in f32, 32 bytes of nibbles into `values`, of two numbers the first one's high.
fn of_64(b: &[u8; 36], y: &mut [f32; 64], values: &[f32; 16]) {
    let most = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    for (b, y) in b[4..].iter().zip(y.as_chunks_mut::<2>().0) {
        *y = [b >> 4, b & 15].map(|code| values[code as usize] * most);
    }
}

// Blocks of 256

/// Two-bit code `i` of 64 bytes: each half of 32 bytes holds 128 codes, 32 in each pair of bits.
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3
}

/// Nibble `i` of 128 bytes as Q4_K and Q5_K lay them: 32 bytes hold 64 codes, low halves first.
fn k_nibble(qs: &[u8], i: usize) -> u8 {
    qs[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15
}

/// 16 bytes (scale low, minimum high nibble), 64 bytes of codes, `d`, `dmin` f16: d s q - dmin m, in sub-blocks of 16.
fn q2_k(b: &[u8; 84], y: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let sm = b[i / 16];
        *y = d * (sm & 15) as f32 * two_bits(&b[16..], i) as f32 - dmin * (sm >> 4) as f32;
    }
}

/// 32 bytes of third bits, 64 of codes, 12 of scales, `d` f16: d s (q - 4), in sub-blocks of 16.
fn q3_k(b: &[u8; 110], y: &mut [f32; 256]) {
    let d = f16_at(b, 108);
    for (i, y) in y.iter_mut().enumerate() {
        let third = b[i % 32] >> (i / 32) & 1;
        let q = (two_bits(&b[32..], i) | third << 2) as f32 - 4.0;
        *y = d * q3_k_scale(i / 16, &b[96..]) as f32 * q;
    }
}

/// `d`, `dmin` f16, 12 bytes of scales and minima, 128 of nibbles: d s q - dmin m, in sub-blocks of 32.
fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        let (s, m) = k_scale_min(i / 32, &b[4..]);
        *y = d * s as f32 * k_nibble(&b[16..], i) as f32 - dmin * m as f32;
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `j` of byte `l` belongs to code `l` of sub-block `j`.
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        let (s, m) = k_scale_min(i / 32, &b[4..]);
        let fifth = b[16 + i % 32] >> (i / 32) & 1;
        *y = d * s as f32 * (k_nibble(&b[48..], i) | fifth << 4) as f32 - dmin * m as f32;
    }
}

/// 128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, `d` f16: d s (q - 32), in sub-blocks of 16.
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = f16_at(b, 208);
    for (i, y) in y.iter_mut().enumerate() {
        let low = b[i / 128 * 64 + i % 64] >> (4 * (i / 64 % 2)) & 15;
        let q = (low | two_bits(&b[128..], i) << 4) as f32 - 32.0;
        *y = d * b[192 + i / 16] as i8 as f32 * q;
    }
}

/// `d` f16, two bytes of high and four of low scale bits, 128 of nibbles into [`IQ4_VALUES`]: d s v,
/// in sub-blocks of 32.
fn iq4_xs(b: &[u8; 136], y: &mut [f32; 256]) {
    let (d, high) = (f16_at(b, 0), u16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        let j = i / 32;
        let code = nibble(&b[8 + 16 * j..], i % 32);
        *y = d * iq4_xs_scale(j, high, &b[4..]) as f32 * IQ4_VALUES[code as usize] as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of one block.
    fn block(ty: TensorType, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; ty.block_len()];
        dequantize(ty, bytes, &mut out);
        out
    }

    const ONE: [u8; 2] = 0x3c00_u16.to_le_bytes();
    const TWO: [u8; 2] = 0x4000_u16.to_le_bytes();

    #[test]
    fn ids_and_names_lead_back_to_the_type() {
        for ty in TensorType::GGUF {
            assert_eq!(ty.id().and_then(TensorType::from_id), Some(ty));
        }
        for ty in TensorType::ALL {
            assert_eq!(TensorType::from_name(&ty.name().to_lowercase()), Some(ty));
            assert_eq!(format!("{ty:?}"), ty.name());
        }
        assert_eq!(TensorType::from_id(4), None);
        assert_eq!(TensorType::from_name("Q4"), None);
    }

    #[test]
    fn a_row_is_a_whole_number_of_blocks() {
        assert_eq!(TensorType::Q4_K.row_bytes(512), Some(288));
        assert_eq!(TensorType::Q4_K.row_bytes(500), None);
        assert_eq!(TensorType::Q8_0.row_bytes(0), Some(0));
        assert_eq!(TensorType::F32.row_bytes(usize::MAX), None);
    }

    #[test]
    #[should_panic(expected = "32 numbers of Q4_0")]
    fn a_wrong_length_is_a_defect_of_the_caller() {
        dequantize(TensorType::Q4_0, &[0; 17], &mut [0.0; 32]);
    }

    #[test]
    fn plain_types_are_their_values() {
        assert_eq!(block(TensorType::F32, &1.5f32.to_le_bytes()), [1.5]);
        assert_eq!(
            block(TensorType::F16, &0x0001_u16.to_le_bytes()),
            [2f32.powi(-24)]
        );
        assert_eq!(block(TensorType::BF16, &0xc020_u16.to_le_bytes()), [-2.5]);
    }

    #[test]
    fn low_nibbles_come_before_high_ones() {
        let codes: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let y = block(TensorType::Q4_0, &[&TWO[..], &codes].concat());
        let y_1 = block(TensorType::Q4_1, &[&TWO[..], &ONE, &codes].concat());
        let nl = block(TensorType::IQ4_NL, &[&ONE[..], &codes].concat());
        for i in 0..16 {
            assert_eq!(
                (y[i], y[16 + i]),
                (2.0 * i as f32 - 16.0, 14.0 - 2.0 * i as f32)
            );
            assert_eq!(
                (y_1[i], y_1[16 + i]),
                (2.0 * i as f32 + 1.0, 31.0 - 2.0 * i as f32)
            );
            assert_eq!(
                (nl[i], nl[16 + i]),
                (IQ4_VALUES[i] as f32, IQ4_VALUES[15 - i] as f32)
            );
        }
    }

    #[test]
    fn the_fifth_bit_is_worth_sixteen() {
        let fifth = 0x8000_0001_u32.to_le_bytes();
        let y = block(TensorType::Q5_0, &[&ONE[..], &fifth, &[0x21; 16]].concat());
        assert_eq!((y[0], y[1], y[30], y[31]), (1.0, -15.0, -14.0, 2.0));
        let y = block(
            TensorType::Q5_1,
            &[&ONE[..], &TWO, &fifth, &[0x21; 16]].concat(),
        );
        assert_eq!((y[0], y[1], y[30], y[31]), (19.0, 3.0, 4.0, 20.0));
    }

    #[test]
    fn q8_0_codes_are_signed() {
        let y = block(TensorType::Q8_0, &[&TWO[..], &[0x80; 31], &[0x7f]].concat());
        assert_eq!((y[0], y[31]), (-256.0, 254.0));
    }

    #[test]
    fn mxfp4_takes_half_the_scale_of_doubled_values() {
        let y = block(TensorType::MXFP4, &[&[127][..], &[0xf7; 16]].concat());
        assert_eq!((y[0], y[16]), (6.0, -6.0));
        assert_eq!(e8m0_half_to_f32(0), 2f32.powi(-126) / 4.0);
        assert_eq!(e8m0_half_to_f32(1), 2f32.powi(-126) / 2.0);
        assert_eq!(e8m0_half_to_f32(2), 2f32.powi(-126));
        assert_eq!(e8m0_half_to_f32(255), 2f32.powi(127));
    }

    #[test]
    fn nf4_and_fp4_are_shares_of_the_largest_with_high_nibbles_first() {
        let codes: Vec<u8> = (0..32).map(|i| (i % 16) << 4 | (15 - i % 16)).collect();
        for (ty, values) in [(TensorType::NF4, NF4_VALUES), (TensorType::FP4, FP4_VALUES)] {
            assert_eq!(ty.id(), None);
            let y = block(ty, &[&3.0f32.to_le_bytes()[..], &codes].concat());
            for (i, y) in y.iter().enumerate() {
                let code = if i % 2 == 0 {
                    i / 2 % 16
                } else {
                    15 - i / 2 % 16
                };
                assert_eq!(*y, values[code] * 3.0);
            }
        }
        assert_eq!((FP4_VALUES[3], FP4_VALUES[13]), (1.0, -0.5));
        assert_eq!(FP4_VALUES[8].to_bits(), 0);
    }

    #[test]
    fn six_bit_scales_and_minima_unpack() {
        // Packed as the format says: the first four whole, the others in pieces.
        let wanted: Vec<(u8, u8)> = (0..8).map(|j| (8 * j + 3, 63 - 7 * j)).collect();
        let mut packed = [0; 12];
        for j in 0..4 {
            let ((s, m), (s4, m4)) = (wanted[j], wanted[j + 4]);
            packed[j] = s | s4 >> 4 << 6;
            packed[j + 4] = m | m4 >> 4 << 6;
            packed[j + 8] = s4 & 15 | m4 << 4;
        }
        let got: Vec<_> = (0..8).map(|j| k_scale_min(j, &packed)).collect();
        assert_eq!(got, wanted);
    }

    #[test]
    fn signed_scales_unpack() {
        let mut packed = [0; 12];
        packed[1] = 0x90; // low bits of sub-block 9
        packed[9] = 3 << 4; // high bits of sub-block 9 = 1 + 4 * 2
        assert_eq!(q3_k_scale(9, &packed), 0x39 - 32);
        assert_eq!(q3_k_scale(1, &packed), -32);
        assert_eq!(iq4_xs_scale(5, 2 << 10, &[0, 0, 0x70, 0]), 0x27 - 32);
        assert_eq!(iq4_xs_scale(4, 2 << 10, &[0, 0, 0x70, 0]), -32);
    }

    #[test]
    fn q4_k_multiplies_scales_and_subtracts_minima() {
        let mut b = [0; 144];
        b[..4].copy_from_slice(&[TWO, ONE].concat());
        (b[5], b[9]) = (3, 4); // sub-block 1: scale 3, minimum 4
        b[16] = 0xa5; // code 0 of sub-block 0 is 5, of sub-block 1 is 10
        let y = block(TensorType::Q4_K, &b);
        assert_eq!(
            (y[0], y[32], y[33], y[64]),
            (0.0, 2.0 * 3.0 * 10.0 - 4.0, -4.0, 0.0)
        );
    }

    /// 64 blocks of pseudo-random bytes, infinities and subnormals among the scales; `id` is the seed.
    fn noise(ty: TensorType) -> Vec<u8> {
        let mut x = u64::from(ty.id().unwrap());
        let mut next = || {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (x >> 56) as u8
        };
        (0..64 * ty.block_bytes()).map(|_| next()).collect()
    }

    /// FNV-1a over the bits of each number, every NaN as one.
    fn hash(numbers: &[f32]) -> u64 {
        let bits = |x: &f32| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() };
        numbers.iter().fold(0xcbf29ce484222325, |h, x| {
            (h ^ bits(x) as u64).wrapping_mul(0x100000001b3)
        })
    }

    #[test]
    fn every_bit_is_that_of_the_gguf_package() {
        // The same noise through gguf.quants.dequantize of the Python package gguf 0.19, hashed the same way.
        let wanted: [(TensorType, u64); 16] = [
            (TensorType::F32, 0x4300520511e6a230),
            (TensorType::F16, 0xc3704734ad1ca825),
            (TensorType::Q4_0, 0xafe431205ecb1725),
            (TensorType::Q4_1, 0x4213e3ba5ef149b3),
            (TensorType::Q5_0, 0xd24e9c3fc07cd725),
            (TensorType::Q5_1, 0xf78b905355e92ea0),
            (TensorType::Q8_0, 0xefe91bdf0eb3eaa5),
            (TensorType::Q2_K, 0x717acc42dce22b22),
            (TensorType::Q3_K, 0xcf57ffca56635765),
            (TensorType::Q4_K, 0xdcf44ef97c965f7a),
            (TensorType::Q5_K, 0xe608cc43ba285559),
            (TensorType::Q6_K, 0x833f7fddb9f47fc7),
            (TensorType::IQ4_NL, 0x188e9efc9ef92265),
            (TensorType::IQ4_XS, 0xb5985cb8dbd9e539),
            (TensorType::BF16, 0x21ba43d354310825),
            (TensorType::MXFP4, 0x3c8d4592e36ec325),
        ];
        for (ty, wanted) in wanted {
            let mut out = vec![0.0; 64 * ty.block_len()];
            dequantize(ty, &noise(ty), &mut out);
            assert_eq!(hash(&out), wanted, "{}", ty.name());
        }
    }
}
