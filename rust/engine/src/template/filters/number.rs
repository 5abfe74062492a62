//! Filters that make numbers, or text of numbers.

use super::super::methods;
use super::super::run::{CallArgs, Run};
use super::super::value::{Budget, Res, Value, fault};

pub(super) fn filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    match value {
        Value::Undefined(missing) => return missing.fault(),
        Value::Str(s) => run.budget.bytes(s.text.len())?,
        _ => {}
    }
    match name {
        "int" => {
            let [default, base] = args.bind(name, ["default", "base"])?;
            let default = default.unwrap_or(Value::Int(0));
            Ok(to_int(value, base.as_ref()).unwrap_or(default))
        }
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let parsed = match value {
                Value::Str(s) => parse_float(&s.text),
                other => other.as_float(),
            };
            Ok(parsed.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "abs" => match (value, value.as_int()) {
            (Value::Float(f), _) => Ok(Value::Float(f.abs())),
            (Value::Big(digits), _) => Ok(Value::Big(digits.trim_start_matches('-').into())),
            (_, Some(i)) => match i.checked_abs() {
                Some(i) => Ok(Value::Int(i)),
                None => Value::integer(&i.unsigned_abs().to_string()),
            },
            _ => fault(format!(
                "bad operand type for abs(): '{}'",
                value.type_name()
            )),
        },
        "round" => round(value, args, &mut run.budget),
        _ => {
            let [binary] = args.bind(name, ["binary"])?;
            let bytes = match value {
                Value::Str(s) => parse_float(&s.text),
                other => other.as_float(),
            };
            let Some(bytes) = bytes else {
                return fault("could not convert to float");
            };
            let text = file_size(bytes, binary.is_some_and(|b| b.truth()));
            Ok(Value::made(text, &run.budget))
        }
    }
}

fn parse_float(text: &str) -> Option<f64> {
    let t = methods::stripped(text, "strip", None);
    let plain = t.trim_start_matches(['+', '-']).to_ascii_lowercase();
    if matches!(&*plain, "inf" | "infinity" | "nan")
        || plain.starts_with(|c: char| c.is_ascii_digit() || c == '.')
    {
        return t.replace('_', "").parse().ok();
    }
    None
}

fn to_int(value: &Value, base: Option<&Value>) -> Option<Value> {
    match value {
        Value::Big(_) => Some(value.clone()),
        Value::Float(f) if f.is_finite() => Value::integer(&format!("{:.0}", f.trunc())).ok(),
        Value::Str(s) => {
            let base = base.and_then(Value::as_int).unwrap_or(10);
            let t = methods::stripped(&s.text, "strip", None).to_ascii_lowercase();
            let (negative, digits) = match t.strip_prefix('-') {
                Some(rest) => (true, rest),
                None => (false, t.strip_prefix('+').unwrap_or(&t)),
            };
            let (base, digits) = match (base, digits.get(..2)) {
                (16 | 0, Some("0x")) => (16, &digits[2..]),
                (8 | 0, Some("0o")) => (8, &digits[2..]),
                (2 | 0, Some("0b")) => (2, &digits[2..]),
                (0, _) => (10, digits),
                (base, _) => (base, digits),
            };
            let base = u32::try_from(base).ok().filter(|b| (2..=36).contains(b))?;
            let digits = digits.replace('_', "");
            let sign = if negative { "-" } else { "" };
            if !digits.starts_with(|c: char| c.is_ascii_alphanumeric()) {
                return parse_float(&s.text)
                    .filter(|f| f.is_finite())
                    .map(|f| Value::Int(f.trunc() as i128));
            }
            match i128::from_str_radix(&format!("{sign}{digits}"), base) {
                Ok(i) => Some(Value::Int(i)),
                Err(_) if base == 10 && digits.bytes().all(|b| b.is_ascii_digit()) => {
                    Value::integer(&format!("{sign}{digits}")).ok()
                }
                // int(float(value)), as the filter tries next.
                Err(_) => parse_float(&s.text)
                    .filter(|f| f.is_finite())
                    .map(|f| Value::Int(f.trunc() as i128)),
            }
        }
        other => other.as_int().map(Value::Int),
    }
}

fn round(value: &Value, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let precision = precision
        .and_then(|p| p.as_int())
        .unwrap_or(0)
        .clamp(-300, 300) as i32;
    let method = method
        .unwrap_or_else(|| Value::from("common"))
        .to_text(budget)?;
    let Some(f) = value.as_float() else {
        return fault(format!(
            "type {} doesn't define __round__ method",
            value.type_name()
        ));
    };
    let scale = 10f64.powi(precision);
    match (&*method, value) {
        ("common", Value::Int(_) | Value::Bool(_)) if precision >= 0 => {
            Ok(Value::Int(value.as_int().unwrap_or(0)))
        }
        ("common", _) if precision >= 0 => {
            let text = format!("{f:.*}", precision as usize);
            Ok(Value::Float(text.parse().unwrap_or(f)))
        }
        ("common", Value::Int(_) | Value::Bool(_)) => Ok(Value::Int(round_int(
            value.as_int().unwrap_or(0),
            precision.unsigned_abs(),
        ))),
        ("common", _) => Ok(Value::Float((f * scale).round_ties_even() / scale)),
        ("ceil" | "floor", _) if (f * scale).is_nan() => {
            fault("cannot convert float NaN to integer")
        }
        ("ceil" | "floor", _) if (f * scale).is_infinite() => {
            fault("cannot convert float infinity to integer")
        }
        // Python's are whole numbers, of which none is minus zero.
        ("ceil", _) => Ok(Value::Float(((f * scale).ceil() + 0.0) / scale)),
        ("floor", _) => Ok(Value::Float(((f * scale).floor() + 0.0) / scale)),
        _ => fault("method must be common, ceil or floor"),
    }
}

/// An integer rounded to so many zeros, halves to even.
fn round_int(i: i128, zeros: u32) -> i128 {
    let Some(unit) = 10i128.checked_pow(zeros) else {
        return 0;
    };
    let rest = i.rem_euclid(unit);
    let down = i.saturating_sub(rest);
    let up = match (rest.saturating_mul(2)).cmp(&unit) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => (down / unit) % 2 != 0,
    };
    if up { down.saturating_add(unit) } else { down }
}

fn file_size(bytes: f64, binary: bool) -> String {
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    let units = match binary {
        true => ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"],
        false => ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"],
    };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes as i64);
    }
    let mut unit = base;
    for (i, name) in units.iter().enumerate() {
        unit = base.powi(i as i32 + 2);
        if bytes < unit {
            return format!("{:.1} {name}", base * bytes / unit);
        }
    }
    format!("{:.1} {}", base * bytes / unit, units[7])
}
