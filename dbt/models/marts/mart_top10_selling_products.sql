with

sales as (

    select * from {{ ref('mart_products_revenue_profit') }}

),

final as (

    select
        row_number() over (order by units_sold desc, product_id) as product_rank,
        product_id,
        product_name,
        units_sold,
        revenue
    from sales
    qualify product_rank <= 10

)

select * from final
