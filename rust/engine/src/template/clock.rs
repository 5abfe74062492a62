//! The clock of `strftime_now`: Python's datetime.now().strftime in the C locale.

/// A local date and time without a zone, as datetime.now() gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    pub year: i32,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

impl Now {
    /// The local clock.
    pub fn local() -> Now {
        let now = jiff::Zoned::now();
        Now {
            year: now.year().into(),
            month: now.month() as u8,
            day: now.day() as u8,
            hour: now.hour() as u8,
            minute: now.minute() as u8,
            second: now.second() as u8,
        }
    }

    /// Days since 1970-01-01, in the Gregorian calendar.
    fn days(self) -> i64 {
        let year = i64::from(self.year) - i64::from(self.month <= 2);
        let month = (i64::from(self.month) + 9) % 12;
        let of_era = year.rem_euclid(400);
        let of_year = (153 * month + 2) / 5 + i64::from(self.day) - 1;
        year.div_euclid(400) * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year
            - 719_468
    }

    /// 0 is Sunday.
    fn weekday(self) -> i64 {
        (self.days() + 4).rem_euclid(7)
    }

    /// 1 is the first of January.
    fn day_of_year(self) -> i64 {
        self.days()
            - Now {
                month: 1,
                day: 1,
                ..self
            }
            .days()
            + 1
    }

    /// The ISO year and week: a week belongs to the year of its Thursday.
    fn iso(self) -> (i32, i64) {
        let monday_first = (self.weekday() + 6) % 7;
        let thursday = self.day_of_year() - monday_first + 3;
        let length = |year| {
            Now {
                year,
                month: 12,
                day: 31,
                ..self
            }
            .day_of_year()
        };
        if thursday < 1 {
            return (
                self.year.saturating_sub(1),
                (thursday + length(self.year.saturating_sub(1)) - 1) / 7 + 1,
            );
        }
        if thursday > length(self.year) {
            return (self.year.saturating_add(1), 1);
        }
        (self.year, (thursday - 1) / 7 + 1)
    }

    /// Expand a strftime format. An unknown directive stays as it is written.
    pub fn strftime(self, format: &str) -> String {
        let mut out = String::with_capacity(format.len() + 16);
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let Some(mut directive) = chars.next() else {
                out.push('%');
                break;
            };
            let unpadded = directive == '-';
            if unpadded {
                let Some(next) = chars.next() else {
                    out.push_str("%-");
                    break;
                };
                directive = next;
            }
            match self.directive(directive) {
                Some(text) if unpadded => {
                    let stripped = text.trim_start_matches(['0', ' ']);
                    out.push_str(if stripped.is_empty() { "0" } else { stripped });
                }
                Some(text) => out.push_str(&text),
                None => {
                    out.push('%');
                    out.push(directive);
                }
            }
        }
        out
    }

    fn directive(self, directive: char) -> Option<String> {
        let hour12 = (self.hour + 11) % 12 + 1;
        let day = DAYS[self.weekday() as usize % 7];
        let month = MONTHS[usize::from(self.month.clamp(1, 12)) - 1];
        Some(match directive {
            'Y' => self.year.to_string(),
            'C' => format!("{:02}", self.year / 100),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'H' => format!("{:02}", self.hour),
            'k' => format!("{:2}", self.hour),
            'I' => format!("{hour12:02}"),
            'l' => format!("{hour12:2}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'f' => "000000".into(),
            'p' => (if self.hour < 12 { "AM" } else { "PM" }).into(),
            'P' => (if self.hour < 12 { "am" } else { "pm" }).into(),
            'A' => day.into(),
            'a' => day[..3].into(),
            'B' => month.into(),
            'b' | 'h' => month[..3].into(),
            'j' => format!("{:03}", self.day_of_year()),
            'u' => ((self.weekday() + 6) % 7 + 1).to_string(),
            'w' => self.weekday().to_string(),
            'U' => format!("{:02}", (self.day_of_year() + 6 - self.weekday()) / 7),
            'W' => format!(
                "{:02}",
                (self.day_of_year() + 6 - (self.weekday() + 6) % 7) / 7
            ),
            'V' => format!("{:02}", self.iso().1),
            'G' => self.iso().0.to_string(),
            'g' => format!("{:02}", self.iso().0.rem_euclid(100)),
            'D' | 'x' => self.strftime("%m/%d/%y"),
            'T' | 'X' => self.strftime("%H:%M:%S"),
            'F' => self.strftime("%Y-%m-%d"),
            'R' => self.strftime("%H:%M"),
            'r' => self.strftime("%I:%M:%S %p"),
            'c' => self.strftime("%a %b %e %H:%M:%S %Y"),
            's' => (self.days() * 86400
                + i64::from(self.hour) * 3600
                + i64::from(self.minute) * 60
                + i64::from(self.second))
            .to_string(),
            // A naive datetime has no zone.
            'Z' | 'z' => String::new(),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            _ => return None,
        })
    }
}
