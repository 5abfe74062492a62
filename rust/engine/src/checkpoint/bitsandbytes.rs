//! bitsandbytes: NF4 and FP4, whose scales may be quantised themselves (QLoRA), and the int8 of LLM.int8().

use serde::Deserialize;

use super::{FLOATS, Parts, unsupported};
use crate::error::Result;
use crate::quantised::{Dtype, Groups, Layout, Part, Quantised, Scales, Values, Zeros};

pub(super) fn gather(parts: &mut Parts) -> Result<()> {
    for (end, kind, values) in [
        (".quant_state.bitsandbytes__nf4", "NF4", Values::Nf4),
        (".quant_state.bitsandbytes__fp4", "FP4", Values::Fp4),
    ] {
        for name in parts.ending(end) {
            let state = parts.require(&format!("{name}{end}"))?;
            let matrix = four_bits(parts, &name, &state, kind, values)?;
            parts.insert(name, matrix)?;
        }
    }
    for module in parts.ending(".SCB") {
        let matrix = eight_bits(parts, &module)?;
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    Ok(())
}

/// What a 4-bit tensor's state says in JSON.
#[derive(Deserialize)]
struct State {
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

fn four_bits(
    parts: &mut Parts,
    name: &str,
    state: &Part,
    kind: &'static str,
    values: Values,
) -> Result<Quantised> {
    let text = state.bytes(&parts.weights.files);
    let state: State = serde_json::from_slice(text)
        .map_err(|e| parts.problem(format!("the state of {name:?} is wrong: {e}")))?;
    let count = |shape: &[usize]| shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim));
    let numbers = count(&state.shape).filter(|n| *n > 0 && state.blocksize > 0);
    let (Some(numbers), &[outputs, inputs]) = (numbers, &state.shape[..]) else {
        let (shape, each) = (&state.shape, state.blocksize);
        return Err(parts.problem(format!(
            "tensor {name:?} is {shape:?} in blocks of {each}, wanted a matrix"
        )));
    };
    // Any dtype may hold the codes: whole numbers of it, so there may be some bytes more.
    let codes = parts.require(name)?;
    let (got, wanted) = (codes.bytes.len(), numbers.div_ceil(2));
    if got < wanted || got >= wanted + codes.dtype.size() {
        return Err(parts.problem(format!(
            "tensor {name:?} has {got} bytes, wanted {wanted} for {:?}",
            state.shape
        )));
    }
    let blocks = numbers.div_ceil(state.blocksize);
    let absmax_name = format!("{name}.absmax");
    let absmax = parts.require_as(
        &absmax_name,
        &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::U8],
        &[blocks],
    )?;
    // A constant of the format, which the library does not read either.
    parts.take(&format!("{name}.quant_map"));
    let scales = match absmax.dtype {
        Dtype::U8 => nested(parts, name, absmax, blocks, &state)?,
        _ => Scales::Plain {
            part: absmax,
            transposed: false,
            divisor: 1.0,
        },
    };
    Ok(Quantised {
        kind,
        shape: [outputs, inputs],
        codes,
        layout: Layout::Nibbles,
        values,
        scales,
        zeros: Zeros::Fixed(0),
        groups: match inputs.is_multiple_of(state.blocksize) {
            true => Groups::Blocks([1, state.blocksize]),
            false => Groups::Flat(state.blocksize),
        },
    })
}

fn nested(
    parts: &mut Parts,
    name: &str,
    codes: Part,
    blocks: usize,
    state: &State,
) -> Result<Scales> {
    let (Some(each), Some(offset)) = (state.nested_blocksize, state.nested_offset) else {
        let problem = format!("the state of {name:?} says nothing of its nested scales");
        return Err(parts.problem(problem));
    };
    if each == 0 {
        return Err(parts.problem(format!("the state of {name:?} has a nested_blocksize of 0")));
    }
    let map = format!("{name}.nested_quant_map");
    let absmax = format!("{name}.nested_absmax");
    Ok(Scales::Nested {
        codes,
        values: parts.require_as(&map, &FLOATS, &[256])?,
        scales: parts.require_as(&absmax, &FLOATS, &[blocks.div_ceil(each)])?,
        each,
        offset: offset as f32,
    })
}

fn eight_bits(parts: &mut Parts, module: &str) -> Result<Quantised> {
    let name = format!("{module}.weight");
    let codes = parts.require(&name)?;
    let shape = parts.matrix(&name, &codes, &[Dtype::I8])?;
    let scales = parts.require_as(&format!("{module}.SCB"), &FLOATS, &shape[..1])?;
    if let Some(format) = parts.take(&format!("{module}.weight_format")) {
        // Rows, or an order of some generation of GPUs.
        let number = format.bytes(&parts.weights.files).first().copied();
        if number.is_some_and(|n| n != 0) {
            let name = format!("{} of {module}", number.unwrap_or_default());
            return Err(unsupported("weight_format", &name, "0 (rows)"));
        }
    }
    Ok(Quantised {
        kind: "LLM.int8",
        shape,
        codes,
        layout: Layout::Signed,
        values: Values::Whole,
        scales: Scales::Plain {
            part: scales,
            transposed: false,
            divisor: 127.0,
        },
        zeros: Zeros::Fixed(128),
        groups: Groups::Blocks([1, shape[1]]),
    })
}
