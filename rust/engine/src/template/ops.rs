//! Python's operators over values.

use num_bigint::{BigInt, Sign};

use super::format;
use super::origin::{Str, Text};
use super::program::{Comparison, Op};
use super::run::Run;
use super::value::{Budget, Res, Value, fault, html_escape};

impl Run<'_> {
    pub(super) fn add(&mut self, left: &Value, right: &Value) -> Res<Value> {
        self.binary(Op::Add, left, right)
    }

    pub fn binary(&mut self, op: Op, left: &Value, right: &Value) -> Res<Value> {
        if let Value::Undefined(missing) = left {
            return missing.fault();
        }
        if let (Op::Rem, Value::Str(template)) = (op, left) {
            return format::percent(template, right, &mut self.budget);
        }
        if let Value::Undefined(missing) = right {
            return missing.fault();
        }
        match (op, left, right) {
            (Op::Add, Value::Str(a), Value::Str(b)) => self.add_text(a, b),
            (Op::Add, Value::List(a), Value::List(b)) => {
                let items = [a.items.as_slice(), &b.items].concat();
                Value::list(items, &mut self.budget)
            }
            (Op::Add, Value::Tuple(a), Value::Tuple(b)) => {
                let items = [a.items.as_slice(), &b.items].concat();
                Value::tuple(items, &mut self.budget)
            }
            (Op::Mul, Value::Str(_) | Value::List(_) | Value::Tuple(_), n)
                if n.as_int().is_some() =>
            {
                self.repeat(left, n)
            }
            (Op::Mul, n, Value::Str(_) | Value::List(_) | Value::Tuple(_))
                if n.as_int().is_some() =>
            {
                self.repeat(right, n)
            }
            _ => arithmetic(op, left, right),
        }
    }

    /// Markup + str escapes the str, whatever autoescape says.
    fn add_text(&mut self, a: &Str, b: &Str) -> Res<Value> {
        self.budget.bytes(a.text.len() + b.text.len())?;
        let markup = a.markup || b.markup;
        let mut out = Text::with_capacity(a.text.len() + b.text.len());
        for s in [a, b] {
            match markup && !s.markup {
                true => out.made(&html_escape(&s.text), &s.origin),
                false => out.str(s),
            }
        }
        Ok(Value::Str(out.finish(markup)))
    }

    fn repeat(&mut self, value: &Value, times: &Value) -> Res<Value> {
        let times = usize::try_from(times.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
        match value {
            Value::Str(s) => {
                self.budget.bytes(s.text.len().saturating_mul(times))?;
                let times = if s.text.is_empty() { 0 } else { times };
                let mut out = Text::with_capacity(s.text.len().saturating_mul(times));
                for _ in 0..times {
                    out.str(s);
                }
                Ok(Value::Str(out.finish(s.markup)))
            }
            Value::List(s) | Value::Tuple(s) => {
                let each = s.items.len() * size_of::<Value>();
                self.budget.bytes(each.saturating_mul(times))?;
                let times = if s.items.is_empty() { 0 } else { times };
                let items = std::iter::repeat_n(&s.items, times)
                    .flatten()
                    .cloned()
                    .collect();
                match value {
                    Value::Tuple(_) => Value::tuple(items, &mut self.budget),
                    _ => Value::list(items, &mut self.budget),
                }
            }
            other => fault(format!("cannot repeat '{}'", other.type_name())),
        }
    }
}

pub(super) fn compare(
    op: Comparison,
    left: &Value,
    right: &Value,
    budget: &mut Budget,
) -> Res<bool> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    Ok(match op {
        Comparison::Eq => left.equals(right, budget)?,
        Comparison::Ne => !left.equals(right, budget)?,
        Comparison::In => right.contains(left, budget)?,
        Comparison::NotIn => !right.contains(left, budget)?,
        Comparison::Lt => left.compare(right, "<", budget)? == Some(Less),
        Comparison::Gt => left.compare(right, ">", budget)? == Some(Greater),
        Comparison::Le => matches!(left.compare(right, "<=", budget)?, Some(Less | Equal)),
        Comparison::Ge => matches!(left.compare(right, ">=", budget)?, Some(Greater | Equal)),
    })
}

pub(super) fn negate(value: &Value) -> Res<Value> {
    match value {
        Value::Undefined(missing) => missing.fault(),
        Value::Float(f) => Ok(Value::Float(-f)),
        Value::Big(digits) => Value::integer(&match digits.strip_prefix('-') {
            Some(positive) => positive.to_owned(),
            None => format!("-{digits}"),
        }),
        other => match other.as_int().and_then(i128::checked_neg) {
            Some(i) => Ok(Value::Int(i)),
            None => fault(format!(
                "bad operand type for unary -: '{}'",
                other.type_name()
            )),
        },
    }
}

fn arithmetic(op: Op, left: &Value, right: &Value) -> Res<Value> {
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        return int_arithmetic(op, a, b);
    }
    if let (Some(a), Some(b)) = (as_big(left), as_big(right)) {
        return big_arithmetic(op, &a, &b);
    }
    match (left.as_float(), right.as_float()) {
        (Some(a), Some(b)) => float_arithmetic(op, a, b),
        _ => {
            let sign = match op {
                Op::Add => "+",
                Op::Sub => "-",
                Op::Mul => "*",
                Op::Div => "/",
                Op::FloorDiv => "//",
                Op::Rem => "%",
                Op::Pow => "**",
            };
            let (a, b) = (left.type_name(), right.type_name());
            fault(format!(
                "unsupported operand type(s) for {sign}: '{a}' and '{b}'"
            ))
        }
    }
}

fn int_arithmetic(op: Op, a: i128, b: i128) -> Res<Value> {
    if b == 0 && matches!(op, Op::Div | Op::FloorDiv | Op::Rem) {
        return fault("division by zero");
    }
    let result = match op {
        Op::Add => a.checked_add(b),
        Op::Sub => a.checked_sub(b),
        Op::Mul => a.checked_mul(b),
        Op::Div => return Ok(Value::Float(divide(a, b))),
        Op::FloorDiv => a.checked_div_euclid(b).map(|q| {
            if b < 0 && a.rem_euclid(b) != 0 {
                q - 1
            } else {
                q
            }
        }),
        Op::Rem => a.checked_rem(b).map(|r| {
            if r != 0 && (r < 0) != (b < 0) {
                r + b
            } else {
                r
            }
        }),
        Op::Pow if b < 0 && a == 0 => return fault("0.0 cannot be raised to a negative power"),
        Op::Pow if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
        Op::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
    };
    match result {
        Some(i) => Ok(Value::Int(i)),
        None => big_arithmetic(op, &a.into(), &b.into()),
    }
}

/// The quotient as the nearest float.
fn divide(a: i128, b: i128) -> f64 {
    const EXACT: u128 = 1 << 53;
    let (size, by) = (a.unsigned_abs(), b.unsigned_abs());
    if size <= EXACT && by <= EXACT {
        return a as f64 / b as f64;
    }
    big_divide(&a.into(), &b.into())
}

/// An integer of any size.
pub(super) fn as_big(value: &Value) -> Option<BigInt> {
    match value {
        Value::Big(digits) => digits.parse().ok(),
        other => other.as_int().map(BigInt::from),
    }
}

/// Integers past 128 bits, as long as Python would still print them.
fn big_arithmetic(op: Op, a: &BigInt, b: &BigInt) -> Res<Value> {
    const MOST_BITS: u64 = 14_300;
    let zero = BigInt::ZERO;
    if *b == zero && matches!(op, Op::Div | Op::FloorDiv | Op::Rem) {
        return fault("division by zero");
    }
    let floored = || {
        let (quotient, rest) = (a / b, a % b);
        match rest != zero && (rest < zero) != (*b < zero) {
            true => (quotient - 1, rest + b),
            false => (quotient, rest),
        }
    };
    let result = match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a * b,
        Op::FloorDiv => floored().0,
        Op::Rem => floored().1,
        Op::Div => {
            return match big_divide(a, b) {
                quotient if quotient.is_finite() => Ok(Value::Float(quotient)),
                _ => fault("integer division result too large for a float"),
            };
        }
        Op::Pow => match u32::try_from(b) {
            Ok(power) if a.bits().saturating_mul(power.into()) <= MOST_BITS => a.pow(power),
            _ => return fault("the power does not fit into 4300 digits"),
        },
    };
    if result.bits() > MOST_BITS {
        return fault("the result does not fit into 4300 digits");
    }
    Value::integer(&result.to_string())
}

/// The float nearest to `a / b`, as Python rounds it.
fn big_divide(a: &BigInt, b: &BigInt) -> f64 {
    const BITS: i64 = 66; // more than a float has, less than a u128
    let shift = BITS - (a.bits() as i64 - b.bits() as i64);
    let (top, bottom) = (a.magnitude().clone(), b.magnitude().clone());
    let (top, bottom) = match usize::try_from(shift) {
        Ok(up) => (top << up, bottom),
        Err(_) => (top, bottom << shift.unsigned_abs() as usize),
    };
    let whole = &top / &bottom;
    // What is left only says on which side of a tie the quotient lies.
    let rest = u128::from(&whole * &bottom != top);
    let quotient = (u128::try_from(whole).unwrap_or(u128::MAX) | rest) as f64;
    let half = (-shift / 2) as i32;
    let size = quotient * 2f64.powi(half) * 2f64.powi((-shift) as i32 - half);
    if (a.sign() == Sign::Minus) == (b.sign() == Sign::Minus) {
        size
    } else {
        -size
    }
}

fn float_arithmetic(op: Op, a: f64, b: f64) -> Res<Value> {
    if b == 0.0 && matches!(op, Op::Div | Op::FloorDiv | Op::Rem) {
        return fault("float division by zero");
    }
    // As CPython's float_divmod has it, signs of zeros included.
    let divmod = || {
        let rest = a % b;
        let quotient = (a - rest) / b;
        let (rest, quotient) = match rest != 0.0 {
            true if (rest < 0.0) != (b < 0.0) => (rest + b, quotient - 1.0),
            true => (rest, quotient),
            false => (0.0f64.copysign(b), quotient),
        };
        let floor = quotient.floor();
        let whole = match quotient != 0.0 {
            true if quotient - floor > 0.5 => floor + 1.0,
            true => floor,
            false => 0.0f64.copysign(a / b),
        };
        (whole, rest)
    };
    Ok(Value::Float(match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a * b,
        Op::Div => a / b,
        Op::FloorDiv => divmod().0,
        Op::Rem => divmod().1,
        Op::Pow if a == 0.0 && b < 0.0 => return fault("0.0 cannot be raised to a negative power"),
        Op::Pow if a < 0.0 && b.fract() != 0.0 => {
            return fault("a negative number to a broken power is complex: not supported");
        }
        Op::Pow => match a.powf(b) {
            power if power.is_infinite() && a.is_finite() && b.is_finite() => {
                return fault("(34, 'Numerical result out of range')");
            }
            power => power,
        },
    }))
}
