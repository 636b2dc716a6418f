//! Figures, and the table of their medians.

use std::collections::BTreeMap;

/// One figure: what was measured, its unit, and its value.
pub(crate) struct Figure {
    /// What was measured, such as `SmolLM2 decode`.
    pub(crate) subject: &'static str,
    /// How, such as `SQL`.
    pub(crate) path: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// Its value.
    pub(crate) value: f64,
}

/// Something that can be measured again and again.
pub(crate) trait Measurement {
    /// Measures once.
    fn run(&mut self) -> Vec<Figure>;
}

/// Measurements that are taken in turn.
pub(crate) type Measurements = Vec<Box<dyn Measurement>>;

/// All figures so far.
#[derive(Default)]
pub(crate) struct Results {
    figures: BTreeMap<(&'static str, &'static str, &'static str), Vec<f64>>,
}

impl Results {
    /// Adds the figures of one run.
    pub(crate) fn add(&mut self, figures: Vec<Figure>) {
        for figure in figures {
            println!(
                "{} | {} | {:.3} {}",
                figure.subject, figure.path, figure.value, figure.unit
            );
            self.figures
                .entry((figure.subject, figure.path, figure.unit))
                .or_default()
                .push(figure.value);
        }
    }

    /// Prints the medians as a table in Markdown.
    pub(crate) fn print(&self) {
        println!("\n| what | how | median | least | most | unit |\n| --- | --- | ---: | ---: | ---: | --- |");
        for ((subject, path, unit), values) in &self.figures {
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let (least, most) = (sorted[0], sorted[sorted.len() - 1]);
            println!(
                "| {subject} | {path} | {:.2} | {least:.2} | {most:.2} | {unit} |",
                median(&sorted)
            );
        }
    }
}

/// Median of sorted values.
pub(crate) fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}
