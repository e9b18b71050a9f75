// The page is whole without this. It adds a switch of the theme, and tables that sort by the header that is clicked.
(() => {
  const root = document.documentElement;
  const remembered = (use) => { try { return use(window.localStorage); } catch { return null; } }; // some browsers forbid it
  const themes = ["auto", "light", "dark"];
  const before = remembered((store) => store.getItem("moco-eval-theme"));
  root.dataset.theme = themes.includes(before) ? before : "auto"; // before anything is drawn

  const addSwitch = () => {
    const button = document.createElement("button");
    const say = () => { button.textContent = `theme: ${root.dataset.theme}`; };
    button.type = "button";
    button.className = "theme";
    button.addEventListener("click", () => {
      root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
      remembered((store) => store.setItem("moco-eval-theme", root.dataset.theme));
      say();
    });
    say();
    document.querySelector("header").prepend(button);
  };

  const words = (row, column) => row.cells[column].textContent.trim();
  const number = (row, column) => parseFloat(words(row, column));
  const sort = (table, header) => {
    const column = header.cellIndex;
    const rows = [...table.tBodies[0].rows];
    const full = rows.filter((row) => words(row, column) !== "-");
    const numbers = full.every((row) => !Number.isNaN(number(row, column)));
    const first = numbers ? "descending" : "ascending"; // the highest number first, the first name first
    const other = numbers ? "ascending" : "descending";
    const now = header.getAttribute("aria-sort") === first ? other : first;
    const order = numbers
      ? (a, b) => number(a, column) - number(b, column)
      : (a, b) => words(a, column).localeCompare(words(b, column), undefined, { numeric: true });
    full.sort((a, b) => (now === "ascending" ? order(a, b) : order(b, a)));
    table.tBodies[0].append(...full, ...rows.filter((row) => !full.includes(row)));
    for (const each of header.parentNode.cells) each.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", now);
  };
  const addSorting = (table) => {
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(table, header));
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    addSwitch();
    document.querySelectorAll("table.sortable").forEach(addSorting);
  });
})();
