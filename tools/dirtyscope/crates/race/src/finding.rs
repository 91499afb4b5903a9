// SPDX-License-Identifier: GPL-2.0-only

//! The known defects of type1 that several threads meet, by what exactly they show.

/// A defect: the functions that tasks wait in for good, each with one of them in its stack and none of
/// these without a task, and how the kernel's complaints begin, all of them.
struct Known {
    defect: &'static str,
    waits: &'static [&'static [&'static str]],
    complaints: &'static [&'static str],
}

const KNOWN: &[Known] = &[
    // One unmap waits for the others' lock, and holds the one that the devices of the other want.
    Known {
        defect: "D2",
        waits: &[
            &["vfio_iommu_type1_unpin_pages+", "vfio_iommu_type1_pin_pages+"],
            &[
                "vfio_iommu_type1_ioctl+",
                "vfio_iommu_type1_register_device+",
                "vfio_iommu_type1_unregister_device+",
            ],
        ],
        complaints: &[],
    },
    Known {
        defect: "D10",
        waits: &[],
        complaints: &["usercopy: Kernel memory exposure attempt detected from"],
    },
    Known {
        defect: "D24",
        waits: &[],
        complaints: &["kernel BUG at drivers/vfio/vfio_iommu_type1.c:"],
    },
];

/// What is said of a history that D25 explains, and the model doesn't.
pub const D25: &str = ", but as D25 has it";

/// What the kernel goes on to say.
const FOLLOWS: &[&str] = &["Oops: invalid opcode:", "kernel BUG at mm/usercopy.c:", "INFO: task "];

/// Which known defect shows so, if one does: by what a worker says, the stacks of what hangs, and complaints.
pub fn name(what: &str, stacks: Option<&str>, complaints: &[String]) -> Option<&'static str> {
    if stacks.is_none() && complaints.is_empty() {
        return what.contains(D25).then_some("D25");
    }
    let found = KNOWN.iter().find(|known| known.shows(stacks, complaints));
    found.map(|known| known.defect)
}

impl Known {
    fn shows(&self, stacks: Option<&str>, complaints: &[String]) -> bool {
        let says = |text: &str, begin: &&str| text.contains(*begin);
        let said = |begin: &&str| complaints.iter().any(|text| says(text, begin));
        let strange =
            |text: &&String| !self.complaints.iter().chain(FOLLOWS).any(|begin| says(text, begin));
        let tasks: Vec<_> = stacks.unwrap_or_default().split("task ").skip(1).collect();
        let waits = |one: &&&[&str]| {
            tasks.iter().any(|stack| one.iter().any(|function| stack.contains(function)))
        };
        // A deadlock makes no complaint but of tasks that are blocked; where the kernel has killed
        // one, others wait for what it had.
        self.complaints.iter().all(said)
            && !complaints.iter().any(|text| strange(&text))
            && self.waits.iter().all(|one| waits(&one))
            && (self.waits.is_empty() || stacks.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defects_are_known_by_what_they_show() {
        let complaint = |text: &[&str]| text.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
        let bug = complaint(&["kernel BUG at drivers/vfio/vfio_iommu_type1.c:1504!"]);
        assert_eq!(name("", None, &bug), Some("D24"));
        let other = complaint(&["kernel BUG at drivers/vfio/vfio_iommu_type1.c:1!", "KASAN: x"]);
        assert_eq!(name("", None, &other), None);
        let stacks =
            "task 1: D\n vfio_iommu_type1_unpin_pages+0x1\ntask 2: D\n vfio_iommu_type1_ioctl+0x2";
        assert_eq!(name("", Some(stacks), &[]), Some("D2"));
        assert_eq!(name("", Some("task 1: D\n vfio_iommu_type1_ioctl+0x2"), &[]), None);
        assert_eq!(name("", None, &[]), None);
    }
}
