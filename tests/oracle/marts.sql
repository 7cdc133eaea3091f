-- Every mart once more, in Postgres, straight from the raw tables: what the dbt models must come to.
-- The setting finpro.time_zone says whose days count; the table cost_changes, what products cost before each change, and when it was.

create temporary view local_orders as
select *, (created_date at time zone current_setting('finpro.time_zone'))::date as order_date
from raw_orders;

create temporary view mart_fraud_attempt_trends as
select
    order_date,
    count(*) as total_orders,
    count(*) filter (where status = 'Fraud') as fraud_orders,
    avg((status = 'Fraud')::int::float8) as fraud_rate,
    (
        select avg((select count(*) from local_orders as o where o.order_date = day::date and status = 'Fraud')::float8)
        from generate_series(
            greatest(orders.order_date - 6, (select min(order_date) from local_orders)), orders.order_date, interval '1 day'
        ) as day
    ) as fraud_orders_7d_avg,
    count(*) filter (where reasons @> '{coordinated_users}') as coordinated_users,
    count(*) filter (where reasons @> '{foreign_country}') as foreign_country,
    count(*) filter (where reasons @> '{night_amount}') as night_amount,
    count(*) filter (where reasons @> '{night_quantity}') as night_quantity,
    count(*) filter (where reasons @> '{repeat_purchase}') as repeat_purchase,
    count(*) filter (where reasons @> '{sequential_users}') as sequential_users
from local_orders as orders
group by order_date;

create temporary view mart_fraud_daily_saved_amount as
select
    order_date,
    count(*) filter (where status = 'Fraud') as fraud_orders,
    coalesce(sum(amount_numeric) filter (where status = 'Fraud'), 0) as saved_amount,
    (
        select coalesce(sum(amount_numeric), 0)
        from local_orders as o
        where o.order_date <= orders.order_date and status = 'Fraud'
    ) as cumulative_saved_amount
from local_orders as orders
group by order_date;

create temporary view mart_fraud_reasons_by_day as
select order_date, reason, count(*) as orders, sum(amount_numeric) as amount
from local_orders
cross join unnest(reasons) as reason
group by order_date, reason;

-- The Wilson interval as textbooks write it, with p the share of frauds, n the orders and z = 1.96.
create temporary view mart_high_risk_products as
select
    (row_number() over (order by at_least desc, product_id)) as risk_rank,
    product_id, product_name, category, n as total_orders, frauds as fraud_orders, p as fraud_rate,
    at_least as fraud_rate_at_least, fraud_amount
from (
    select
        *,
        (p + 1.96 ^ 2 / (2 * n) - 1.96 * sqrt(p * (1 - p) / n + 1.96 ^ 2 / (4 * n::float8 ^ 2)))
            / (1 + 1.96 ^ 2 / n) as at_least
    from (
        select
            product_id,
            count(*) as n,
            count(*) filter (where status = 'Fraud') as frauds,
            avg((status = 'Fraud')::int::float8) as p,
            sum(amount_numeric) filter (where status = 'Fraud') as fraud_amount
        from raw_orders
        group by product_id
    ) as counted
    where frauds > 0
) as bounded
left join raw_products using (product_id);

create temporary view mart_products_revenue_profit as
select
    product_id, product_name, category,
    sum(quantity) as units_sold,
    sum(amount_numeric) as revenue,
    sum(quantity::numeric * cost_then) as cost,
    sum(amount_numeric - quantity::numeric * cost_then) as profit,
    (sum(amount_numeric - quantity::numeric * cost_then) / nullif(sum(amount_numeric), 0))::float8 as margin
from (
    select
        *,
        coalesce(
            (
                select cost_before
                from cost_changes
                where cost_changes.product_id = raw_orders.product_id and changed_at > raw_orders.created_date
                order by changed_at
                limit 1
            ),
            (select cost from raw_products where raw_products.product_id = raw_orders.product_id)
        ) as cost_then
    from raw_orders
) as sales
left join (select product_id, product_name, category from raw_products) as known using (product_id)
where status = 'Genuine'
group by product_id, product_name, category;

create temporary view mart_rule_quality as
select
    date_trunc('week', order_date)::date as week,
    reason as rule,
    count(*) as hits,
    count(outcome) as reviewed,
    count(*) filter (where outcome = 'fraud') as confirmed,
    case when count(outcome) >= 20 then avg((outcome = 'fraud')::int::float8) end as precision_of_reviewed,
    coalesce(sum(amount_numeric) filter (where outcome = 'fraud'), 0) as saved_amount,
    coalesce(sum(amount_numeric) filter (where outcome = 'genuine'), 0) as wrongly_held_amount
from (
    select
        *,
        (
            select outcome
            from order_outcomes as stated
            where stated.order_id = local_orders.order_id
            order by decided_at desc, outcome_id desc
            limit 1
        ) as outcome
    from local_orders
) as orders
cross join unnest(reasons) as reason
group by 1, 2;

create temporary view mart_top10_active_users as
select
    row_number() over (order by count(*) desc, user_id) as user_rank,
    user_id, name, count(*) as orders, sum(amount_numeric) as amount
from raw_orders
left join raw_users using (user_id)
where status = 'Genuine'
group by user_id, name
order by count(*) desc, user_id
limit 10;

create temporary view mart_top10_selling_products as
select
    row_number() over (order by sum(quantity) desc, product_id) as product_rank,
    product_id, product_name, sum(quantity) as units_sold, sum(amount_numeric) as revenue
from raw_orders
left join raw_products using (product_id)
where status = 'Genuine'
group by product_id, product_name
order by sum(quantity) desc, product_id
limit 10;

create temporary view mart_top10_users_fraud as
select
    row_number() over (order by count(*) desc, user_id) as user_rank,
    user_id, name, count(*) as fraud_orders, sum(amount_numeric) as fraud_amount,
    (
        select reason
        from raw_orders o, unnest(o.reasons) as reason
        where o.user_id = raw_orders.user_id and o.status = 'Fraud'
        group by reason
        order by count(*) desc, reason collate "C"
        limit 1
    ) as main_reason
from raw_orders
left join raw_users using (user_id)
where status = 'Fraud'
group by user_id, name
order by count(*) desc, user_id
limit 10;
