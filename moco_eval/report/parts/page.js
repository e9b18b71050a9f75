// The page is whole without this. It adds a switch of the theme, and tables that sort by the header that is clicked.
(() => {
  const root = document.documentElement;
  const remembered = (set) => { try { return set(window.localStorage); } catch { return null; } }; // forbidden for some files
  const themes = ["auto", "light", "dark"];
  const toggle = document.createElement("button");
  const show = (theme) => {
    root.dataset.theme = theme;
    toggle.textContent = `theme: ${theme}`;
    remembered((store) => store.setItem("moco-eval-theme", theme));
  };
  toggle.type = "button";
  toggle.className = "theme";
  toggle.addEventListener("click", () => show(themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length]));
  document.querySelector("header").prepend(toggle);
  const before = remembered((store) => store.getItem("moco-eval-theme"));
  show(themes.includes(before) ? before : "auto");

  const value = (row, column) => row.cells[column].textContent.trim();
  const order = (a, b) => {
    const [x, y] = [parseFloat(a), parseFloat(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  };
  const sort = (table, header) => {
    const column = header.cellIndex;
    const rows = [...table.tBodies[0].rows];
    const numbers = rows.some((row) => !Number.isNaN(parseFloat(value(row, column))));
    const first = numbers ? "descending" : "ascending"; // the highest number first, the first name first
    const down = (header.getAttribute("aria-sort") === first) !== numbers;
    const [empty, full] = [rows.filter((row) => value(row, column) === "-"), rows.filter((row) => value(row, column) !== "-")];
    full.sort((a, b) => (down ? -1 : 1) * order(value(a, column), value(b, column)));
    table.tBodies[0].append(...full, ...empty);
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(table, header));
    }
  }
})();
