//! What was measured, and the table of it: medians over the rounds, and ratios taken within each round.

use crate::contestant::{DIRECT, GATEWAY, NGINX};

/// All figures of a run, in the order in which they were first noted.
pub struct Table {
    contestants: Vec<String>,
    rows: Vec<Row>,
    /// What could not be measured.
    pub remarks: Vec<String>,
}

struct Row {
    figure: String,
    digits: usize,
    goal: Goal,
    /// For each contestant the value of each round, NaN where there is none.
    cells: Vec<Vec<f64>>,
}

/// What the gateway's figure has to be.
#[derive(Clone, Copy)]
pub enum Goal {
    None,
    AtMost(f64),
    /// No further from zero than this.
    Within(f64),
    /// This often the figure of nginx.
    AtMostOfNginx(f64),
    AtLeastOfNginx(f64),
}

impl Table {
    pub fn new(contestants: Vec<String>) -> Table {
        Table { contestants, rows: Vec::new(), remarks: Vec::new() }
    }

    /// Notes a value of one contestant in one round.
    pub fn note(
        &mut self,
        figure: &str,
        digits: usize,
        goal: Goal,
        contestant: &str,
        round: usize,
        value: f64,
    ) {
        let at = self.rows.iter().position(|row| row.figure == figure).unwrap_or_else(|| {
            let cells = vec![Vec::new(); self.contestants.len()];
            self.rows.push(Row { figure: figure.to_owned(), digits, goal, cells });
            self.rows.len() - 1
        });
        let Some(column) = self.contestants.iter().position(|name| name == contestant) else {
            return;
        };
        let cell = &mut self.rows[at].cells[column];
        cell.resize(cell.len().max(round + 1), f64::NAN);
        cell[round] = value;
    }

    /// What was noted of a figure.
    pub fn value(&self, figure: &str, contestant: &str) -> Option<f64> {
        let column = self.contestants.iter().position(|name| name == contestant)?;
        median(&self.rows.iter().find(|row| row.figure == figure)?.cells[column])
    }

    /// A part that one contestant could not do.
    pub fn remark(&mut self, part: &str, contestant: &str, error: &std::io::Error) {
        let remark = format!("{part}: {contestant} is left out: {error}");
        if !self.remarks.contains(&remark) {
            eprintln!("  {remark}");
            self.remarks.push(remark);
        }
    }

    /// GitHub's Markdown. In parentheses: the gateway's figure divided by this one.
    pub fn markdown(&self) -> String {
        let gateway = self.contestants.iter().position(|name| name == GATEWAY);
        let nginx = self.contestants.iter().position(|name| name == NGINX);
        let mut text = format!("| figure | {} | goal |\n|---|", self.contestants.join(" | "));
        text += &"---:|".repeat(self.contestants.len());
        text += "---|\n";
        for row in &self.rows {
            text += &format!("| {} |", row.figure);
            for (column, cell) in row.cells.iter().enumerate() {
                let Some(value) = median(cell) else {
                    text += " |";
                    continue;
                };
                text += &format!(" {}", number(value, row.digits));
                let ratio = gateway
                    .filter(|gateway| *gateway != column)
                    .and_then(|at| ratio(&row.cells[at], cell));
                if let Some(ratio) = ratio {
                    text += &format!(" ({ratio:.2})");
                }
                text += " |";
            }
            let measured = gateway.and_then(|at| median(&row.cells[at]));
            let of_nginx =
                gateway.zip(nginx).and_then(|(at, nginx)| ratio(&row.cells[at], &row.cells[nginx]));
            text += &format!(" {} |\n", row.goal.told(measured, of_nginx, row.digits));
        }
        text
    }
}

impl Goal {
    fn told(self, measured: Option<f64>, of_nginx: Option<f64>, digits: usize) -> String {
        let (goal, is_met) = match self {
            Goal::None => return String::new(),
            Goal::AtMost(most) => {
                (format!("≤ {}", number(most, digits)), measured.map(|value| value <= most))
            }
            Goal::Within(most) => {
                (format!("± {}", number(most, digits)), measured.map(|value| value.abs() <= most))
            }
            Goal::AtMostOfNginx(most) => {
                (format!("≤ {most:.2} nginx"), of_nginx.map(|ratio| ratio <= most))
            }
            Goal::AtLeastOfNginx(least) => {
                (format!("≥ {least:.2} nginx"), of_nginx.map(|ratio| ratio >= least))
            }
        };
        match is_met {
            Some(true) => format!("{goal}: met"),
            Some(false) => format!("**{goal}: missed**"),
            None => format!("{goal}: not measured"),
        }
    }
}

/// Whether ratios to this contestant say something: `direct` has no figures of a proxy.
pub fn is_proxy(name: &str) -> bool {
    name != DIRECT
}

/// The median of the ratios of the rounds that both have; nothing is said of what is not positive.
fn ratio(of: &[f64], to: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = of
        .iter()
        .zip(to)
        .filter(|(of, to)| **of > 0.0 && **to > 0.0)
        .map(|(of, to)| of / to)
        .collect();
    median(&ratios)
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The value that so many of a hundred samples do not exceed; sorts them.
pub fn percentile(samples: &mut [u64], percent: usize) -> u64 {
    samples.sort_unstable();
    match samples.len() {
        0 => 0,
        count => samples[(count * percent / 100).min(count - 1)],
    }
}

/// With so many decimals, and the thousands set apart.
pub fn number(value: f64, digits: usize) -> String {
    let text = format!("{:.digits$}", value.abs());
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    let is_zero = text.chars().all(|c| c == '0' || c == '.');
    let sign = if value < 0.0 && !is_zero { "-" } else { "" };
    format!("{sign}{grouped}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_rounds_and_goals_checked() {
        let mut table = Table::new(["direct", "nginx", "limitrate"].map(str::to_owned).to_vec());
        for (round, (nginx, gateway)) in
            [(10.0, 20.0), (1000.0, 3000.0), (4.0, 10.0)].into_iter().enumerate()
        {
            table.note("requests/s", 0, Goal::AtLeastOfNginx(0.7), "nginx", round, nginx * 1000.0);
            table.note(
                "requests/s",
                0,
                Goal::AtLeastOfNginx(0.7),
                "limitrate",
                round,
                gateway * 1000.0,
            );
        }
        table.note("RSS", 2, Goal::AtMost(4.0), "limitrate", 0, 4.06);
        let text = table.markdown();
        assert!(
            text.contains("| requests/s | | 10,000 (2.50) | 20,000 | ≥ 0.70 nginx: met |"),
            "{text}"
        );
        assert!(text.contains("| RSS | | | 4.06 | **≤ 4.00: missed** |"), "{text}");
    }
}
